// What the simulator offers beside FlexMLRT's interface.
#pragma once

namespace simulator {

/// Seconds of the last computation in this process, added latency not counted: what a bridge's own cost is told from.
double last_forward_seconds();

}  // namespace simulator
