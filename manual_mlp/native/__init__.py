"""Epochs in C: `c_code` writes the sheet's formulas as C, `build` compiles them into `epoch.c`, `net` calls it."""
