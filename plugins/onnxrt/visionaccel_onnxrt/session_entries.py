"""Settings of ONNX Runtime's sessions by their names."""

__all__ = ["CAST_CHAIN_ELIMINATION", "ERRORS_ONLY", "EXTERNAL_DATA_FOLDER", "SPINNING", "UNPACKED"]

EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
CAST_CHAIN_ELIMINATION = "optimization.enable_cast_chain_elimination"
SPINNING = "session.intra_op.allow_spinning"
UNPACKED = "session.disable_prepacking"

ERRORS_ONLY = 3
"""The log's level."""
