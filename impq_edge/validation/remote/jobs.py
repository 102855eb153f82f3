"""A job on the other machine: started or found again, followed to its end, ended with Ctrl-C."""

from typing import Any

from impq_edge.errors import ValidationError
from impq_edge.records import sha256_json
from impq_edge.validation.process import Progress
from impq_edge.validation.remote.ssh import Connection, ConnectionLostError, Say


def follow(connection: Connection, python: str, request: dict[str, Any], progress: Progress, say: Say) -> Any:
    """Do a job there and return its answer.

    A job lives on when the connection breaks, and the same request finds it, or its answer. Ctrl-C ends it.

    Parameters
    ----------
    python
        The Python that runs the agent.
    request
        What :func:`impq_edge.validation.remote.agent.follow` takes; its hash names the job.

    Raises
    ------
    ValidationError
        With the job's own sentence; ConnectionLostError where the connection broke.
    """
    with connection.talk(python, {"op": "follow", "key": sha256_json(request), **request}) as conversation:
        try:
            answer = conversation.result(progress, say)
        except KeyboardInterrupt:
            conversation.stop()
            raise
        except ConnectionLostError:
            raise
        except ValidationError:
            conversation.acknowledge()
            raise
        conversation.acknowledge()
        return answer
