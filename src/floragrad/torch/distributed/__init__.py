"""Several devices: parameters sharded over them, and what their processes exchange."""
