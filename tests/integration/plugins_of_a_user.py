"""What a user gives to `--reasoning-parser-plugin` and `--tool-parser-plugin`."""

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.granite_reasoning_parser import GraniteReasoningParser
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.pythonic_tool_parser import PythonicToolParser


@ReasoningParserManager.register_module("users_thinking")
class UsersReasoningParser(GraniteReasoningParser): ...


@ToolParserManager.register_module("users_calls")
class UsersToolParser(PythonicToolParser): ...
