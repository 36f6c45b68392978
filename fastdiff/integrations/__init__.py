"""Drop-ins for other projects' samplers, one module each, imported only when asked for."""
