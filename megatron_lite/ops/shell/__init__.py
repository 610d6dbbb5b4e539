"""Evaluation of bash job scripts without running them: parsing, word expansion, statements, builtins."""
