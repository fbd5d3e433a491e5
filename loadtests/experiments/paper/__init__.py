"""The experiments of the Llumnix paper (OSDI 2024), as data: one file per figure."""
