from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers import free_port
from tests.services import SECRET, Service, control_server
from torchspec_hpc.transfer.control import ControlClient, ControlLost
from torchspec_hpc.transfer.messages import MessageError, Receipt, Refusal, Request

Connect = Callable[[], ControlClient]


def request(ticket: str) -> Request:
    return Request(ticket, 0, 0, "segment", f"key/{ticket}", b"\x01\x00\x00\x00")


RECEIPT = Receipt("t", "k", (3, 4, 64), "float32", engine=1)


def test_requests_come_in_order_and_are_counted(connect: Connect) -> None:
    client = connect()
    places = [client.push_request(request(str(i))) for i in range(3)]
    assert places == [places[0], places[0] + 1, places[0] + 2]
    assert client.queue_depth() == 3
    assert client.requests_taken() == places[0] - 1
    assert client.pop_request(1) == request("0")
    assert client.requests_taken() == places[0]
    assert [client.pop_request(1), client.pop_request(1)] == [request("1"), request("2")]
    assert client.queue_depth() == 0
    assert client.requests_taken() == places[2]


def test_pop_of_an_empty_queue_gives_up_in_time(connect: Connect) -> None:
    start = time.monotonic()
    assert connect().pop_request(0.3) is None
    assert 0.3 <= time.monotonic() - start < 2


def test_every_request_reaches_exactly_one_of_many_readers(connect: Connect) -> None:
    writer, readers = connect(), [connect() for _ in range(4)]

    def read(client: ControlClient) -> list[str]:
        tickets = []
        while (message := client.pop_request(0.5)) is not None:
            tickets.append(message.ticket)
        return tickets

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(read, client) for client in readers]
        for i in range(400):
            writer.push_request(request(str(i)))
    counts = Counter(ticket for result in results for ticket in result.result())
    assert counts == Counter(str(i) for i in range(400))


def test_a_waiting_pop_does_not_stop_other_calls_of_the_same_client(connect: Connect) -> None:
    client = connect()
    with ThreadPoolExecutor(1) as pool:
        popped = pool.submit(client.pop_request, 10)
        time.sleep(0.1)
        start = time.monotonic()
        client.push_request(request("late"))
        assert popped.result(5) == request("late")
        assert time.monotonic() - start < 2


def test_a_reader_that_went_away_takes_nothing(connect: Connect) -> None:
    leaver, stayer = connect(), connect()
    with ThreadPoolExecutor(1) as pool:
        popped = pool.submit(leaver.pop_request, 10)
        time.sleep(0.1)
        leaver.close()
        with pytest.raises(ControlLost, match="closed"):
            popped.result(5)
    stayer.push_request(request("kept"))
    assert stayer.pop_request(1) == request("kept")


def test_replies_reach_the_rank_they_are_for(connect: Connect) -> None:
    client = connect()
    refusal = Refusal("t", "k", "too long", permanent=True)
    client.push_reply(7, RECEIPT)
    client.push_reply(8, refusal)
    assert client.pop_reply(8, 1) == refusal
    assert client.pop_reply(8, 0) is None
    assert client.pop_reply(7, 1) == RECEIPT


def test_heartbeats_tell_payload_and_age(connect: Connect) -> None:
    client = connect()
    assert client.heartbeats("nobody") == {}
    client.heartbeat("beating", 2, {"tokens": 10, "busy_s": 0.5})
    client.heartbeat("beating", 0, {})
    time.sleep(0.2)
    client.heartbeat("beating", 0, {"tokens": 3})
    beats = connect().heartbeats("beating")
    assert sorted(beats) == [0, 2]
    assert beats[0]["tokens"] == 3
    assert {**beats[2], "age_s": 0} == {"tokens": 10, "busy_s": 0.5, "age_s": 0}
    assert beats[0]["age_s"] < 0.2 <= beats[2]["age_s"] < 5


def test_messages_of_another_secret_are_refused(connect: Connect, control_service: Service) -> None:
    client, stranger = connect(), ControlClient(control_service.endpoint, bytes(32), timeout_s=5)
    stranger.push_request(request("forged"))
    stranger.push_reply(5, RECEIPT)
    stranger.heartbeat("forged", 0, {})
    with pytest.raises(MessageError, match="not authentic"):
        client.pop_request(1)
    with pytest.raises(MessageError, match="not authentic"):
        client.pop_reply(5, 1)
    with pytest.raises(MessageError, match="not authentic"):
        client.heartbeats("forged")
    stranger.close()


def test_a_message_in_the_wrong_queue_is_refused(connect: Connect) -> None:
    client = connect()
    wire = client._codec.encode(RECEIPT)
    client._call(lambda store: store.queue_push("requests", wire))
    with pytest.raises(MessageError, match="Receipt does not belong under 'requests'"):
        client.pop_request(1)


def test_nobody_listening_is_an_error_that_names_the_endpoint() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    start = time.monotonic()
    with pytest.raises(ControlLost, match=f"{endpoint} cannot be reached for 1 s"):
        ControlClient(endpoint, SECRET, timeout_s=1)
    assert time.monotonic() - start < 5


def test_a_dead_server_is_noticed_at_the_first_push_and_may_come_back() -> None:
    port = free_port()
    with control_server(port) as service:
        client = ControlClient(service.endpoint, SECRET, timeout_s=1)
        client.heartbeat("training", 0, {})
        service.process.kill()
        service.process.wait()
        start = time.monotonic()
        with pytest.raises(ControlLost, match=service.endpoint):
            client.push_request(request("lost"))
        assert time.monotonic() - start < 5
    with control_server(port) as service:
        client.push_request(request("again"))
        assert client.pop_request(1) == request("again")
        client.heartbeat("training", 0, {})
        assert list(client.heartbeats("training")) == [0]
    assert service.process.returncode == 0, "SIGTERM is its ordinary end"
    client.close()


def test_a_server_that_hangs_is_lost_within_the_timeout() -> None:
    with control_server() as service:
        clients = [ControlClient(service.endpoint, SECRET, timeout_s=0.5) for _ in range(3)]
        service.process.send_signal(signal.SIGSTOP)
        calls = [
            lambda: clients[0].pop_request(10),
            lambda: clients[1].queue_depth(),
            lambda: ControlClient(service.endpoint, SECRET, timeout_s=0.5),
        ]
        ticks = 0
        with ThreadPoolExecutor(3) as pool:
            start = time.monotonic()
            running = [pool.submit(call) for call in calls]
            while not all(call.done() for call in running):
                time.sleep(0.01)  # cannot return while a call holds the GIL
                ticks += 1
            waited_s = time.monotonic() - start
        for call in running:
            with pytest.raises(
                ControlLost, match=rf"{service.endpoint} is lost: no answer for 1 s"
            ):
                call.result()
        assert waited_s < 4
        assert ticks > 20, "a call held the GIL"
        service.process.send_signal(signal.SIGCONT)


def test_a_client_ends_its_thread(connect: Connect) -> None:
    before = set(threading.enumerate())
    client = connect()
    [thread] = set(threading.enumerate()) - before
    client.close()
    thread.join(5)
    assert not thread.is_alive()
