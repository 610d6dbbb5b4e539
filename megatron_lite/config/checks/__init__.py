"""Validation rules between config fields, one function per rule, run by config/rules.py."""
