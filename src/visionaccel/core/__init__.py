"""What everything speaks in: arrays, grids, programs, contracts; and what reading untrusted input takes."""
