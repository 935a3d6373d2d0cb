from dataclasses import dataclass
@dataclass
class Regex:
    pattern: str
