"""Answers of a given form: grammars are examined, compiled and followed token by token."""
