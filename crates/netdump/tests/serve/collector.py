"""Receives OTLP/HTTP logs in JSON for a test: PORT BUSY FILE.

Each request must be what OpenTelemetry's own definitions allow, or it is answered 400. Each record
becomes a line of FILE. With BUSY 1 the first request is answered 503.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from google.protobuf import json_format
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
from opentelemetry.proto.logs.v1 import logs_pb2

busy = sys.argv[2] == "1"
out = open(sys.argv[3], "a")


def line(handler, resource, record):
    text = lambda attributes: {a.key: a.value.string_value for a in attributes}
    assert record.time_unix_nano > 0 and record.body.string_value
    return json.dumps({
        "authorization": handler.headers.get("Authorization"),
        "host": text(resource.attributes)["host.name"],
        "severity": logs_pb2.SeverityNumber.Name(record.severity_number),
        "event": record.event_name,
        "text": record.body.string_value,
        "attributes": text(record.attributes),
    })


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        global busy
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = 200, logs_service_pb2.ExportLogsServiceResponse()
        if busy:
            status, busy = 503, False
        elif self.path != "/v1/logs" or self.headers["Content-Type"] != "application/json":
            status = 404
        else:
            request = logs_service_pb2.ExportLogsServiceRequest()
            try:
                json_format.Parse(body, request)
            except json_format.ParseError as error:
                print(error, file=sys.stderr)
                status = 400
            for resource_logs in request.resource_logs:
                for scope_logs in resource_logs.scope_logs:
                    for record in scope_logs.log_records:
                        out.write(line(self, resource_logs.resource, record) + "\n")
            out.flush()
        text = json_format.MessageToJson(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("ready", flush=True)
server.serve_forever()
