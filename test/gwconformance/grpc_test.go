package gwconformance

import (
	"context"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	pb "sigs.k8s.io/gateway-api/conformance/echo-basic/grpcechoserver"
)

// echoes answers as the backend of the tests of the Gateway API does.
type echoes struct {
	pb.UnimplementedGrpcEchoServer
	b backend
}

func (b backend) serveGRPC(l net.Listener) {
	s := grpc.NewServer()
	pb.RegisterGrpcEchoServer(s, &echoes{b: b})
	_ = s.Serve(l) // until the program ends
}

// Echo implements pb.GrpcEchoServer.
func (e *echoes) Echo(ctx context.Context, _ *pb.EchoRequest) (*pb.EchoResponse, error) {
	return e.answer(ctx, "Echo"), nil
}

// EchoTwo implements pb.GrpcEchoServer.
func (e *echoes) EchoTwo(ctx context.Context, _ *pb.EchoRequest) (*pb.EchoResponse, error) {
	return e.answer(ctx, "EchoTwo"), nil
}

func (e *echoes) answer(ctx context.Context, method string) *pb.EchoResponse {
	md, _ := metadata.FromIncomingContext(ctx)
	a := &pb.Assertions{
		FullyQualifiedMethod: "/" + pb.GrpcEcho_ServiceDesc.ServiceName + "/" + method,
		Context:              &pb.Context{Namespace: e.b.namespace, Pod: e.b.pod()},
	}
	for name, values := range md {
		for _, v := range values {
			a.Headers = append(a.Headers, &pb.Header{Key: name, Value: v})
			if name == ":authority" {
				a.Authority = v
			}
		}
	}
	return &pb.EchoResponse{Assertions: a}
}
