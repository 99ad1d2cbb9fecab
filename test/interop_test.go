package test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// interopCases are those of grpc-go's interop client that need no service of a
// cloud and, as pick_first_unary, no several servers (interop_test.sh of grpc-go,
// and the soak tests).
var interopCases = []string{
	"empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream",
	"timeout_on_sleeping_server", "cancel_after_begin", "cancel_after_first_response",
	"status_code_and_message", "special_status_message", "custom_metadata",
	"unimplemented_method", "unimplemented_service",
	"orca_per_rpc", "orca_oob", "rpc_soak", "channel_soak",
}

// interop is the sum of the cases, the last line that the tests print.
var interop = &conformSum{conformResult: conformResult{Name: "interop", OK: true}}

// TestInterop has the client of grpc-go speak to its server through a pair of
// sidecars, in every way that it knows.
func TestInterop(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	for _, name := range []string{"client", "server"} {
		buildTool(t, "interop", "google.golang.org/grpc/interop/"+name, "interop-"+name)
	}
	w := newWorld(t, time.Minute)
	w.allowGRPC()
	w.startIssuer()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.speaksH2C(bill)
	w.join(pay)
	_, port, _ := net.SplitHostPort(bill.app)
	w.launch("interop-server", nil, exec.Command(filepath.Join(bin, "interop-server"), "-port", port))
	w.startWorkload(bill.name)
	payment := w.startNode(pay)

	_, port, _ = net.SplitHostPort(pay.billing)
	// The cases of ORCA look at what this balancer is told.
	const balancer = `{"loadBalancingConfig":[{"test_backend_metrics_load_balancer":{}}]}`
	client := func(name string, more ...string) runReply {
		args := []string{filepath.Join(bin, "interop-client"), "-server_host", "127.0.0.1", "-server_port", port, "-test_case", name, "-service_config_json", balancer}
		return ask[runReply](payment, "/run", append(args, more...))
	}
	payment.await("reach the server", func() bool { return client("empty_unary").Code == 0 })
	for _, name := range interopCases {
		t.Run(name, func(t *testing.T) {
			r := client(name)
			interop.count(name, r)
			if r.Code != 0 {
				t.Errorf("it ended with %d:\n%s", r.Code, r.Output)
			}
		})
	}
	t.Run("messages of 3 MB, eight at once", func(t *testing.T) {
		r := client("rpc_soak", "-soak_request_size", "3000000", "-soak_response_size", "3000000", "-soak_num_threads", "8", "-soak_iterations", "16",
			"-soak_per_iteration_max_acceptable_latency_ms", "20000", "-soak_overall_timeout_seconds", "25")
		if r.Code != 0 {
			t.Errorf("it ended with %d:\n%s", r.Code, r.Output)
		}
	})
	empty := w.path("empty.grpc")
	w.put(empty, "\x00\x00\x00\x00\x00")
	grpc := func(protocol, method string) string {
		return ask[runReply](payment, "/run", curl("--noproxy", "*", "--raw", protocol, "-H", "content-type: application/grpc", "-H", "te: trailers", "-H", "connection: te",
			"--data-binary", "@"+empty, "http://"+pay.billing+method)).Output
	}
	t.Run("a call that no rule allows is refused in the words of gRPC", func(t *testing.T) {
		got := grpc("--http2-prior-knowledge", "/grpc.testing.ReconnectService/Start")
		if !strings.HasPrefix(got, "HTTP/2 200") || !strings.Contains(got, "grpc-status: 7\r\n") || !strings.Contains(got, "sallyport-decision: ") {
			t.Errorf("got:\n%s", got)
		}
	})
	t.Run("a client of HTTP/1.1 is answered with trailers", func(t *testing.T) {
		got := grpc("--http1.1", "/grpc.testing.TestService/EmptyCall")
		if !strings.HasPrefix(got, "HTTP/1.1 200") || !strings.Contains(strings.ToLower(got), "\r\n0\r\ngrpc-status: 0\r\n") {
			t.Errorf("got:\n%q", got)
		}
	})
}

// count takes in how a case ended.
func (s *conformSum) count(name string, r runReply) {
	one := conformResult{Name: s.Name, OK: r.Code == 0}
	one.Cases.Tried = 1
	one.Cases.Passed = map[bool]int{true: 1}[one.OK]
	one.Cases.Failed = 1 - one.Cases.Passed
	v := conformVerdict{Name: name, OK: one.OK}
	if !one.OK {
		v.Detail = strings.TrimSpace(r.Output)
	}
	one.Verdicts = []conformVerdict{v}
	s.add(one)
}

// allowGRPC lets payment make the calls of the interop client.
func (w *world) allowGRPC() {
	w.t.Helper()
	file := filepath.Join(w.policy, "access.csv")
	b, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	for i, service := range []string{"grpc.testing.TestService", "grpc.testing.UnimplementedService", "xds.service.orca.v3.OpenRcaService"} {
		b = fmt.Appendf(b, "p, grpc-%d, in, %s, %s, 8443, POST, /%s/**, -, allow\n", i, id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing"), service)
	}
	w.put(file, string(b))
}

// speaksH2C has the sidecar of a node speak HTTP/2 to its application.
func (w *world) speaksH2C(n *node) {
	w.t.Helper()
	file := w.path(n.name, "config.yaml")
	b, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(file, strings.Replace(string(b), fmt.Sprintf("app: %q", n.app), fmt.Sprintf("app: %q, app_protocol: h2c", n.app), 1))
}
