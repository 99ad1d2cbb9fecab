package main

import (
	"bytes"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/mesh"
)

var update = flag.Bool("update", false, "write testdata/tables.golden anew")

// table is one table that the CLI prints, of made-up things.
type table struct {
	name  string
	print func(c *cli) error
}

func tables(now time.Time) []table {
	td := spiffeid.RequireTrustDomainFromString("corp.example")
	id := func(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }
	web, api, node := id("/ns/default/sa/web"), id("/ns/default/sa/api"), id("/spire/agent/join_token/web")
	proxies := []mesh.Proxy{
		{Agent: node, Workload: web, Kind: "sidecar", SVIDExpires: now.Add(42 * time.Minute), PolicyRevision: 7, State: mesh.Synced, Connected: true, LastSeen: now, Since: now.Add(-3 * time.Hour)},
		{Agent: id("/spire/agent/join_token/api"), Workload: api, Kind: "sidecar", SVIDExpires: now.Add(-time.Minute), PolicyRevision: 6, State: mesh.Rejected, Reason: "access.csv:4: no\nmore", LastSeen: now.Add(-50 * time.Hour)},
	}
	var holding []mesh.Proxy
	for i := range 2 {
		t := &mesh.Traffic{Ejections: []mesh.Ejection{{Service: "host:api.stripe.test", Kind: "open", Since: now, Why: "5 consecutive failures"}}}
		for n := range 9 * i {
			t.Ejections = append(t.Ejections, mesh.Ejection{Service: "host:a.test", Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 443), Kind: "ejected", Since: now, Why: "5 consecutive connect errors"})
		}
		holding = append(holding, mesh.Proxy{Agent: node, Workload: id("/ns/edge/sa/gateway"), Kind: "gateway", SVIDExpires: now.Add(42 * time.Minute), PolicyRevision: 7, State: mesh.Synced, Connected: true, Traffic: t})
	}
	entry := mesh.Entry{ID: "e1", SPIFFEID: web, ParentID: node, Selectors: []mesh.Selector{{Type: "child", Value: "true"}}, X509TTL: 30 * time.Minute, DNSNames: []string{"web.corp.example"}, Hint: "main", Admin: true}
	report := newReport("doctor")
	report.add("SP001", "configuration", "issuer", good("/etc/sallyport/issuer.yaml"))
	report.add("SP005", "secrets", "issuer", bad("chmod 600 /k", "/k has mode 0644 and holds a secret"))
	report.add("SP003", "clock", "machine", doubtful("set it", "nothing keeps it"))
	report.add("SP014", "capture", "sidecar", skipped("nobody is to be captured"))
	return []table{
		{"status", func(c *cli) error {
			return c.printStatus(mesh.IssuerStatus{TrustDomain: td, PolicyRevision: 7, PolicyHash: strings.Repeat("ab", 32), LastRefusal: "access.csv:4: no"}, slices.Concat(proxies, holding))
		}},
		{"policy status", func(c *cli) error {
			return c.emitDistribution(distribution{Revision: 7, Hash: strings.Repeat("ab", 32), Connected: 1, Acked: 1, Proxies: proxies})
		}},
		{"entry show", func(c *cli) error { return c.printEntry(entry) }},
		{"agent list", func(c *cli) error {
			return c.printAgents([]mesh.Agent{{ID: node, AttestationType: "join_token", ExpiresAt: now.Add(time.Hour)}, {ID: api, AttestationType: "x509pop", Banned: true, ExpiresAt: now}})
		}},
		{"ca status", func(c *cli) error {
			return c.printRoots(control.RootStatus{Phase: "steady", Next: "prepare", Authorities: []control.AuthorityStatus{{Kind: "x509", ID: strings.Repeat("cd", 20), Signs: true, Expires: now.Add(300 * 24 * time.Hour)}, {Kind: "jwt", ID: "k1", Tainted: true}}})
		}},
		{"rollout status", func(c *cli) error {
			return c.emitDeliveries([]mesh.Delivery{{Service: "api", Route: "main", State: mesh.Stepping, Acked: 2, Proxies: 2, Since: now.Add(-time.Minute), Why: "gate"}})
		}},
		{"id", func(c *cli) error {
			return c.emit(nil, identityHeader, [][]string{identityRow(mesh.IdentityReport{Identity: web, Expires: now.Add(30 * time.Minute), Serial: "4a", Entry: "e1", Parent: node})})
		}},
		{"id explain", func(c *cli) error {
			return c.printProcess(mesh.ProcessReport{PID: 4711, UID: 1000, Exe: "/usr/bin/web", Selectors: []string{"unix:uid:1000", "child:true"}, Served: web, Entries: []mesh.EntryReport{
				{ID: "e1", SPIFFEID: web, Has: []string{"child:true"}}, {ID: "e2", SPIFFEID: api, Has: []string{"unix:uid:1000"}, Misses: []string{"unix:path:/usr/bin/api"}},
			}})
		}},
		{"tls check", func(c *cli) error {
			err := c.printHandshakes(mesh.HandshakeReport{From: web, Expires: now.Add(20 * time.Minute), Service: "api", Identity: api, Revision: 7, Handshakes: []mesh.Handshake{
				{Address: netip.MustParseAddrPort("10.0.0.7:15006"), Peer: api.String(), Expires: now.Add(50 * time.Minute), Version: "TLS 1.3", Cipher: "TLS_AES_128_GCM_SHA256", Exchange: "X25519MLKEM768", Protocol: "sallyport/1", Took: 3 * time.Millisecond},
				{Address: netip.MustParseAddrPort("10.0.0.8:15006"), Err: "dial tcp 10.0.0.8:15006: connect: connection refused"},
			}}, now)
			fmt.Fprintf(c.stdout, "error: %v\n", err)
			return nil
		}},
		{"tap", func(c *cli) error {
			call := mesh.Tapped{Time: now, Reporter: "outbound", Src: web.String(), Dst: api.String(), Route: "api/main", Method: "GET", Path: "/v1/x", Status: 503, Flag: "circuit_open", Trace: "4bf92f3577b34da6a3ce929d0e0e4736",
				Took: 1.25, Retries: 1, Headers: [][2]string{{"Accept", "*/*"}, {"Authorization", "[hidden]"}}, Missed: 3}
			bad := mesh.Tapped{Time: now, Reporter: "inbound", Src: web.String(), Dst: api.String(), Method: "GET", Path: "/\x1b[2J", GRPC: "14"}
			out := mesh.Tapped{Time: now, Reporter: "gateway", Src: web.String(), Dst: "host:api.stripe.test", Method: "CONNECT", Path: "-", Status: 403, Flag: "policy", Denied: true, Decision: "d-1"}
			none := mesh.Tapped{Time: now, Reporter: "gateway", Src: web.String(), Path: "-", Status: 400, Flag: "request"}
			for _, t := range []*mesh.Tapped{&call, &bad, &out, &none} {
				if err := c.showCall(t, true); err != nil {
					return err
				}
			}
			return nil
		}},
		{"doctor", func(c *cli) error { return c.printFindings(report) }},
		{"init", func(c *cli) error {
			return c.printWritten(&newFiles{files: []newFile{{path: "/etc/sallyport/issuer.yaml"}}}, "corp.example", []string{"issuer run"})
		}},
	}
}

// TestTables holds what the CLI prints to testdata/tables.golden; -update writes
// it anew.
func TestTables(t *testing.T) {
	var out bytes.Buffer
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range tables(time.Now()) {
			fmt.Fprintf(&out, "-- %s --\n", tt.name)
			if err := tt.print(&cli{stdout: &out, stderr: &out, format: "table"}); err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
		}
	})
	const file = "testdata/tables.golden"
	if *update {
		if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), want) {
		t.Errorf("the tables differ from %s (go test -run TestTables -update writes it anew):\n%s", file, out.String())
	}
}
