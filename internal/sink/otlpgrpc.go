package sink

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/url"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// otlpGRPC carries OTLP by gRPC. What it does comes one after the other.
type otlpGRPC struct {
	target string
	creds  credentials.TransportCredentials
	token  Secret
	conn   *grpc.ClientConn // nil when nothing is open
}

// otlpPort is where collectors listen for gRPC.
const otlpPort = "4317"

func newOTLPGRPC(c *OTLPConfig, env Env) (exporter, error) {
	u, err := url.Parse(c.URL)
	if err != nil {
		return nil, err
	}
	conf, err := c.config(env)
	if err != nil {
		return nil, err
	}
	if _, err := c.Token.read(); err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	o := &otlpGRPC{target: "passthrough:///" + net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), otlpPort)), creds: credentials.NewTLS(conf), token: c.Token}
	if u.Scheme == "http" {
		o.creds = insecure.NewCredentials()
	}
	return o, nil
}

func (o *otlpGRPC) open() (err error) {
	if o.conn != nil {
		return nil
	}
	o.conn, err = grpc.NewClient(o.target, grpc.WithTransportCredentials(o.creds), grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy()) // what leads out of the mesh must not see the record of it
	return err
}

// The methods are those of the services that opentelemetry-proto defines. Their
// generated clients would bring a gateway from JSON along.
const (
	exportLogs    = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"
	exportTraces  = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
	exportMetrics = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
)

func (o *otlpGRPC) export(ctx context.Context, method string, q, resp proto.Message) error {
	token, err := o.token.read() // each time: it may be replaced while we run
	if err != nil {
		return fmt.Errorf("token: %w", err)
	}
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	if err := o.open(); err != nil {
		return err
	}
	if err := o.conn.Invoke(ctx, method, q, resp); err != nil {
		return grpcAnswer(err)
	}
	return nil
}

// grpcAnswer says what an error means for the batch. Only answers that speak of
// the batch refuse it, whatever OTLP says of the others: a wrong token or address
// is mended, and the records are still to come.
func grpcAnswer(err error) error {
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	no := fmt.Errorf("the server answered %s: %.200q", st.Code(), st.Message())
	switch {
	case st.Code() == codes.InvalidArgument:
		return &refusal{err: no}
	case st.Code() == codes.ResourceExhausted && strings.Contains(st.Message(), "larger than max"):
		return &refusal{err: no, large: true} // as grpc-go and others say it
	}
	for _, d := range st.Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			return &busy{no, max(0, r.GetRetryDelay().AsDuration())}
		}
	}
	return no
}

// close is called after each failure, so that nothing waits for gRPC to try
// again.
func (o *otlpGRPC) close() {
	if o.conn != nil {
		o.conn.Close()
		o.conn = nil
	}
}
