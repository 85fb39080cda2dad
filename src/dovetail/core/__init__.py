"""The engine and its contracts. Knows no hardware and imports no implementation."""
