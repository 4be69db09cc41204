"""What will a step cost? Bytes, operations and time of an update, calculated before anything is loaded or trained."""
