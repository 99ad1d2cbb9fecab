package control

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"sallyport/internal/control/meshpb"
)

var update = flag.Bool("update", false, "write the golden files anew")

// services are all that an issuer answers.
var services = []grpc.ServiceDesc{
	agentv1.Agent_ServiceDesc, entryv1.Entry_ServiceDesc, svidv1.SVID_ServiceDesc, bundlev1.Bundle_ServiceDesc,
	trustdomainv1.TrustDomain_ServiceDesc, localauthorityv1.LocalAuthority_ServiceDesc, meshpb.Mesh_ServiceDesc, meshpb.Admin_ServiceDesc, healthpb.Health_ServiceDesc,
}

// A method is one RPC of the issuer.
type method struct {
	name          string // in full
	stream        bool
	clientStreams bool
}

func methods() (out []method) {
	for _, d := range services {
		for _, m := range d.Methods {
			out = append(out, method{name: "/" + d.ServiceName + "/" + m.MethodName})
		}
		for _, m := range d.Streams {
			out = append(out, method{"/" + d.ServiceName + "/" + m.StreamName, true, m.ClientStreams})
		}
	}
	return out
}

// call sends one message and returns the first answer's error.
func (m method) call(ctx context.Context, cc *grpc.ClientConn, req proto.Message, opts ...grpc.CallOption) error {
	if !m.stream {
		return cc.Invoke(ctx, m.name, req, &emptypb.Empty{}, opts...)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: m.clientStreams}, m.name, opts...)
	if err != nil {
		return err
	}
	if err := st.SendMsg(req); err != nil && err != io.EOF {
		return err
	}
	if err := st.CloseSend(); err != nil {
		return err
	}
	if err := st.RecvMsg(&emptypb.Empty{}); err != io.EOF {
		return err
	}
	return nil
}

// TestEveryCallForEveryCaller writes down what each kind of caller is answered by
// SPIRE's API when it sends an empty request. A new method shows here, and a new
// right.
func TestEveryCallForEveryCaller(t *testing.T) {
	r := manageRig(t, newFederates().with, func(c *ServerConfig) { c.Downstream, c.Roots = &below{ca: c.Authority.(*ca)}, standing() })
	_, h := r.joined("node-a")
	callers := []struct {
		who string
		cc  *grpc.ClientConn
	}{
		{"none", r.raw(nil)}, {"agent", r.raw(h.cert)}, {"workload", r.as(payment)},
		{"downstream", r.as(down)}, {"admin", r.as(boss)}, {"local", r.admin().cc},
	}
	var b strings.Builder
	line := func(cells ...string) {
		text := fmt.Sprintf("%-46s", cells[0])
		for _, c := range cells[1:] {
			text += fmt.Sprintf(" %-18s", c)
		}
		b.WriteString(strings.TrimRight(text, " ") + "\n")
	}
	line("method", "none", "agent", "workload", "downstream", "admin", "local")
	for _, m := range methods() {
		if strings.HasPrefix(m.name, "/sallyport.") {
			continue // ours changes faster; TestWhoMayCallWhat holds it to its rights
		}
		cells := []string{shortMethod(m.name)}
		for _, c := range callers {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			err := m.call(ctx, c.cc, &emptypb.Empty{})
			cancel()
			if st := status.Convert(err); st.Code() != codes.OK && !strings.Contains(st.Message(), " ") {
				t.Errorf("%s as %s is answered %v, which is no sentence", m.name, c.who, err)
			}
			cells = append(cells, status.Code(err).String())
		}
		line(cells...)
	}
	file := filepath.Join("testdata", "calls.golden")
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}
