"""Settings of ONNX Runtime's sessions by their names."""

__all__ = ["CAST_CHAIN_ELIMINATION", "ERRORS_ONLY", "EXTERNAL_DATA_FOLDER", "INT8_IN_FULL", "SPINNING", "UNPACKED"]

EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
CAST_CHAIN_ELIMINATION = "optimization.enable_cast_chain_elimination"
SPINNING = "session.intra_op.allow_spinning"
UNPACKED = "session.disable_prepacking"
INT8_IN_FULL = "session.x64quantprecision"
"""Where x86 has no VNNI, int8 products by kernels that do not cut sums off at 16 bits, which are slower."""

ERRORS_ONLY = 3
"""The log's level."""
