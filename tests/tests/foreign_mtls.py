"""A foreign orchestrator over mutual TLS: it runs, loses its line, and joins again."""

import json
import os
import socket
import sys
import threading

import grpc


class Line:
    """A line to the agent that can be cut."""

    def __init__(self, host, port):
        self.target = (host, port)
        self.sockets = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            self.sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()

    def pump(self, source, sink):
        try:
            while chunk := source.recv(65536):
                sink.sendall(chunk)
        except OSError:
            pass

    def cut(self):
        self.listener.close()
        for one in self.sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            one.close()


def main():
    address, vm, generated, ca, certificate, key = sys.argv[1:7]
    sys.path.insert(0, generated)
    from vmsnap.v1 import workflow_pb2 as w
    from vmsnap.v1 import workflow_pb2_grpc as services

    def read(path):
        with open(path, "rb") as file:
            return file.read()

    credentials = grpc.ssl_channel_credentials(read(ca), read(key), read(certificate))
    host, port = address.rsplit(":", 1)
    line = Line(host, int(port))
    name = "mtls-%d" % os.getpid()
    spec = w.WorkflowSpec(vm_name=vm, action=w.ACTION_CREATE, snapshot_name=name)
    report = {}
    seen = []
    run = None
    with grpc.secure_channel(line.address, credentials) as channel:
        stub = services.WorkflowServiceStub(channel)
        try:
            for message in stub.RunWorkflow(w.RunWorkflowRequest(spec=spec, request_id=name)):
                run = message.event.workflow_id
                seen.append(message.event.sequence)
                if len(seen) == 2:
                    line.cut()
        except grpc.RpcError as error:
            report["cut"] = error.code().name
    with grpc.secure_channel(address, credentials) as channel:
        stub = services.WorkflowServiceStub(channel)
        again = []
        last = None
        for message in stub.WatchWorkflow(
            w.WatchWorkflowRequest(workflow_id=run, from_sequence=seen[-1] + 1)
        ):
            kind = message.event.WhichOneof("kind")
            if kind not in ("heartbeat", "step_progress"):
                again.append(message.event.sequence)
            last = message.event
        report["outcome"] = w.WorkflowState.Name(last.outcome.state)
        workflow = stub.GetWorkflow(w.GetWorkflowRequest(workflow_id=run)).workflow
        report["caller"] = [workflow.caller.identity, workflow.caller.transport]
        clean = w.WorkflowSpec(vm_name=vm, action=w.ACTION_CLEANUP, snapshot_name=name)
        try:
            for _ in stub.RunWorkflow(w.RunWorkflowRequest(spec=clean)):
                pass
        except grpc.RpcError as error:
            report["denied"] = [error.code().name, error.details()]
    report["seen"], report["again"] = seen, again
    report["last"] = workflow.last_sequence
    print(json.dumps(report))


if __name__ == "__main__":
    main()
