"""A client in another language: generated from the .proto files, and by reflection alone.

usage: client.py TARGET PROTO_DIR IMAGE
Creates a network and a service through the generated client, watches the service's task,
then finds the same service through reflection, and tries what must be refused.
"""

import importlib
import sys
import tempfile

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_tools import protoc


def generate(proto_dir):
    out = tempfile.mkdtemp()
    names = ["types", "objects", "store", "control", "dispatcher", "ca", "raft", "node"]
    status = protoc.main(
        ["protoc", f"-I{proto_dir}"]
        + [f"-I{importlib.import_module('grpc_tools').__path__[0]}/_proto"]
        + [f"--python_out={out}", f"--grpc_python_out={out}"]
        + [f"swarm/v1/{name}.proto" for name in names]
    )
    assert status == 0, "protoc failed"
    sys.path.insert(0, out)


def refused(code, call):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == code, (error.code(), error.details())
        assert error.details(), "a refusal says why"
    else:
        raise AssertionError(f"expected {code}")


def main():
    target, proto_dir, image = sys.argv[1:]
    generate(proto_dir)
    control_pb2 = importlib.import_module("swarm.v1.control_pb2")
    control_grpc = importlib.import_module("swarm.v1.control_pb2_grpc")
    objects = importlib.import_module("swarm.v1.objects_pb2")
    types = importlib.import_module("swarm.v1.types_pb2")
    store = importlib.import_module("swarm.v1.store_pb2")

    # Without it grpcio sends the socket's path as the authority, which HTTP/2 servers refuse.
    channel = grpc.insecure_channel(target, options=[("grpc.default_authority", "localhost")])
    control = control_grpc.ControlStub(channel)

    network = control.CreateNetwork(
        control_pb2.CreateNetworkRequest(
            spec=objects.NetworkSpec(
                annotations=types.Annotations(name="py-net"), driver="overlay"
            )
        )
    )
    spec = objects.ServiceSpec(annotations=types.Annotations(name="py"))
    spec.task.container.image = image
    spec.task.container.args.extend(["sleep", "1000000"])
    spec.task.networks.add(target="py-net")
    spec.mode.replicated.replicas = 1
    service = control.CreateService(control_pb2.CreateServiceRequest(spec=spec)).service
    assert len(service.id) == 25, service.id
    assert service.endpoint.virtual_ips[0].network_id == network.id

    # Watch until the task runs.
    watch = control.Watch(
        control_pb2.WatchRequest(
            kinds=[store.OBJECT_KIND_TASK], service_ids=[service.id]
        ),
        timeout=60,
    )
    last = 0
    for message in watch:
        assert message.index >= last, "indexes never go back"
        last = message.index
        states = [event.object.task.status.state for event in message.events]
        if types.TASK_STATE_RUNNING in states:
            break
    watch.cancel()

    # A stale version and bad values are refused, each with its code.
    stale = control_pb2.UpdateServiceRequest(
        service_id=service.id, version=service.meta.version.index - 1, spec=spec
    )
    refused(grpc.StatusCode.ABORTED, lambda: control.UpdateService(stale))
    refused(
        grpc.StatusCode.ALREADY_EXISTS,
        lambda: control.CreateService(control_pb2.CreateServiceRequest(spec=spec)),
    )
    refused(
        grpc.StatusCode.NOT_FOUND,
        lambda: control.GetService(control_pb2.GetServiceRequest(ref="nothing")),
    )
    refused(
        grpc.StatusCode.FAILED_PRECONDITION,
        lambda: control.RemoveNetwork(control_pb2.RemoveNetworkRequest(ref="py-net")),
    )
    # Larger than any message may be.
    huge = objects.ServiceSpec()
    huge.CopyFrom(spec)
    huge.annotations.name = "huge"
    huge.task.container.env.append("X=" + "x" * (5 << 20))
    try:
        control.CreateService(control_pb2.CreateServiceRequest(spec=huge))
        raise AssertionError("an oversized message was accepted")
    except grpc.RpcError as error:
        assert error.code() in (
            grpc.StatusCode.OUT_OF_RANGE,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.INVALID_ARGUMENT,
        ), (error.code(), error.details())

    # The same, knowing nothing beforehand.
    database = ProtoReflectionDescriptorDatabase(channel)
    names = set(database.get_services())
    assert {"swarm.v1.Control", "swarm.v1.NodeLocal", "swarm.v1.Dispatcher"} <= names, names
    pool = descriptor_pool.DescriptorPool(database)
    method = pool.FindServiceByName("swarm.v1.Control").FindMethodByName("GetService")
    request = message_factory.GetMessageClass(method.input_type)
    answer = message_factory.GetMessageClass(method.output_type)
    get = channel.unary_unary(
        "/swarm.v1.Control/GetService",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer.FromString,
    )
    assert get(request(ref="py")).id == service.id
    print("python client: all well")


if __name__ == "__main__":
    main()
