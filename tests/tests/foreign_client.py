"""A foreign client: the contract as grpcio sees it, over a socket or loopback."""

import json
import os
import sys

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status


def main():
    address, vm, generated = sys.argv[1:4]
    sys.path.insert(0, generated)
    from vmsnap.v1 import workflow_pb2 as w
    from vmsnap.v1 import workflow_pb2_grpc as services

    if address.startswith("unix://"):
        address = "unix:" + address[len("unix://"):]
    report = {}
    # grpcio makes the authority of a socket out of its path, which HTTP/2 servers
    # that check it refuse.
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(address, options=options) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest())
        report["health"] = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        report["services"] = sorted(services_of(channel))
        stub = services.WorkflowServiceStub(channel)
        name = "foreign-%d" % os.getpid()
        spec = w.WorkflowSpec(vm_name=vm, action=w.ACTION_CREATE, snapshot_name=name)
        plan = stub.PlanWorkflow(w.PlanWorkflowRequest(spec=spec)).plan
        events = [
            message.event
            for message in stub.RunWorkflow(
                w.RunWorkflowRequest(spec=spec, plan_hash=plan.hash)
            )
        ]
        report["events"] = [event.WhichOneof("kind") for event in events]
        report["sequences"] = [event.sequence for event in events]
        report["changed"] = events[-1].outcome.result.changed
        run = events[0].workflow_id
        again = [
            message.event.sequence
            for message in stub.WatchWorkflow(
                w.WatchWorkflowRequest(workflow_id=run, from_sequence=3)
            )
        ]
        report["watched"] = again
        report["state"] = w.WorkflowState.Name(
            stub.GetWorkflow(w.GetWorkflowRequest(workflow_id=run)).workflow.state
        )
        missing = w.WorkflowSpec(vm_name=vm, action=w.ACTION_REVERT, snapshot_name="foreing")
        try:
            for _ in stub.RunWorkflow(w.RunWorkflowRequest(spec=missing)):
                pass
        except grpc.RpcError as error:
            report["error"] = explain(error)
        bad = w.WorkflowSpec(action=w.ACTION_CREATE, snapshot_name="a b")
        try:
            stub.PlanWorkflow(w.PlanWorkflowRequest(spec=bad))
        except grpc.RpcError as error:
            report["bad"] = explain(error)
        clean = w.WorkflowSpec(vm_name=vm, action=w.ACTION_CLEANUP, snapshot_name=name)
        for _ in stub.RunWorkflow(w.RunWorkflowRequest(spec=clean)):
            pass
    print(json.dumps(report))


def services_of(channel):
    """Names of the services that reflection tells."""
    from grpc_reflection.v1alpha import reflection_pb2 as r

    def ask():
        yield r.ServerReflectionRequest(list_services="")

    call = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=r.ServerReflectionRequest.SerializeToString,
        response_deserializer=r.ServerReflectionResponse.FromString,
    )
    for answer in call(ask()):
        return [service.name for service in answer.list_services_response.service]
    return []


def explain(error):
    """A rich error as plain data."""
    status = rpc_status.from_call(error)
    found = {"code": error.code().name, "fields": []}
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            found.update(reason=info.reason, domain=info.domain, metadata=dict(info.metadata))
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            found["fields"] = [violation.field for violation in bad.field_violations]
    return found


if __name__ == "__main__":
    main()
