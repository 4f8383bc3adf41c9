"""The connector of the pipelined mode, where `--ec-transfer-config` finds it.

`--ec-transfer-config '{"ec_connector": "VisionAccelConnector", "ec_role": "ec_consumer", "ec_connector_module_path":
"visionaccel.integrations.vllm.connector"}'` names it; without that option, visionaccel names it where it can be used.
"""

from visionaccel.integrations.vllm.pipelined.connector import VisionAccelConnector

__all__ = ["VisionAccelConnector"]
