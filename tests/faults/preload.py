"""What the children of the fault suites have imported before they begin: all that the commands import while they work."""

import importlib

for _name in (
    "tests.fakes",
    "matplotlib.backends.backend_agg",
    "mlx_forget.audit.run",
    "mlx_forget.cli",
    "mlx_forget.sweeps.dispatch",
    "mlx_forget.engines.in_process",
    "mlx_forget.laws.bootstrap",
    "mlx_forget.laws.files",
    "mlx_forget.replay.log_probs",
    "mlx_forget.plots",
    "mlx_forget.report.page",
    "mlx_forget.training.run",
    "mlx_forget.sweeps.stages",
    "mlx_forget.studies.loss_matrix",
    "mlx_forget.studies.toy_continual",
    "mlx_forget.tables",
    "pyarrow.parquet",
    "rich.progress",
    "scipy.optimize",
    "sentencepiece",
    "yaml",
):
    importlib.import_module(_name)
