"""The figures of the Llumnix paper's evaluation (OSDI 2024), one module per experiment."""
