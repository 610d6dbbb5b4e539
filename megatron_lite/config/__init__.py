"""What a run is: frozen dataclasses, the flag table, argv to RunConfig and back, and the rules between fields.

Nothing here imports torch, so a command line is checked in a fraction of a second on any machine.
"""
