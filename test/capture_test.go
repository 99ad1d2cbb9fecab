package test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
	"sallyport/internal/store/postgrestest"
)

const (
	workloadUID = 1001
	strangerUID = 1002
)

// capturedWorld has billing behind an ordinary sidecar, and a sidecar for
// payment which runs as this user while every process of workloadUID is the
// workload, captured and without any setting. services.yaml may be replaced.
func capturedWorld(t *testing.T, billingApp, services, access string) (w *world, bill *node, sidecar *proc) {
	t.Helper()
	w = newWorld(t, time.Minute)
	entries, err := os.ReadFile(w.path("policies", "entries.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	const of = "/join_token/payment\n    selectors: [\"child:true\"]"
	if !strings.Contains(string(entries), of) {
		t.Fatal("entries.yaml has another form")
	}
	w.rewrite(w.path("policies", "entries.yaml"), strings.Replace(string(entries), of, fmt.Sprintf("/join_token/payment\n    selectors: [\"unix:uid:%d\"]", workloadUID), 1))
	if services != "" {
		if err := os.RemoveAll(w.path("policies", "tests")); err != nil { // they speak of HTTP
			t.Fatal(err)
		}
		w.rewrite(w.path("policies", "services.yaml"), services)
		w.rewrite(w.path("policies", "guardrails.csv"), "")
		w.rewrite(w.path("policies", "access.csv"), access)
	}
	w.startIssuer()
	bill = &node{name: "billing"}
	w.join(bill)
	bill.in = "203.0.113.7:15006" // not loopback, which is the workload's own
	if billingApp != "" {
		bill.app = billingApp
	}
	w.write(bill.name, w.sidecarConfig(bill, w.token(bill.name)))
	if billingApp != "" {
		w.startWorkload(bill.name)
	} else {
		w.startNode(bill)
	}
	w.write("payment", w.proxyConfig("payment", w.token("payment"))+fmt.Sprintf(`outbound: {listen: 127.0.0.1:15001}
capture:
  users: ["%d"]
  sidecar_user: "%d"
  hold: true
`, workloadUID, os.Getuid()))
	sidecar = w.startCapture()
	return w, bill, sidecar
}

func (w *world) startCapture() *proc {
	w.t.Helper()
	p := w.start("payment", nil, "sidecar", "run", "--config", w.path("payment", "config.yaml"))
	w.awaitReady(p)
	return p
}

// capture runs "sidecar capture ..." for payment.
func (w *world) capture(args ...string) runReply {
	w.t.Helper()
	return command(w.t, filepath.Join(bin, "sidecar"), append([]string{"capture", "--config", w.path("payment", "config.yaml")}, args...)...)
}

// addresses are the virtual ones of a service.
func (w *world) addresses(name string) (v4, v6 string) {
	w.t.Helper()
	w.await("the address of "+name, func() bool {
		r := w.capture("addresses")
		for line := range strings.Lines(r.Output) {
			if a, n, _ := strings.Cut(strings.TrimSpace(line), " "); n == name && strings.Contains(a, ":") {
				v6 = a
			} else if n == name {
				v4 = a
			}
		}
		return v4 != "" && v6 != ""
	})
	return v4, v6
}

// TestCaptureVirtualAddress has curl, which is told of no proxy, call a service
// by its virtual addresses.
func TestCaptureVirtualAddress(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	meshtest.Need(t, "curl")
	nft := meshtest.Need(t, "nft")
	w, bill, sidecar := capturedWorld(t, "", "", "")
	const outside = "http://203.0.113.7:8000/"
	answerOutside(t)
	v4, v6 := w.addresses("billing.mesh.internal")
	call := func(uid uint32, address, url string) runReply {
		t.Helper()
		return as(t, uid, curl("--resolve", "billing.mesh.internal:80:"+address, url)...)
	}
	const charges = "http://billing.mesh.internal/v1/charges/5"
	w.await("call billing", func() bool { return strings.Contains(call(workloadUID, v4, charges).Output, `"path":"/v1/charges/5"`) })
	for _, address := range []string{v4, "[" + v6 + "]"} {
		r := call(workloadUID, address, charges)
		if p := read(t, r); p.status != "200" || !strings.Contains(p.body, id("/ns/shop/sa/payment")) {
			t.Errorf("%s: %s, the application was told %s", address, p.status, p.body)
		}
	}
	t.Run("the address of an endpoint", func(t *testing.T) {
		if p := read(t, as(t, workloadUID, curl("http://"+bill.in+"/v1/charges/5")...)); p.status != "200" {
			t.Errorf("%s: %s", p.status, p.body)
		}
	})
	t.Run("what no row allows", func(t *testing.T) {
		p := read(t, call(workloadUID, v4, "http://billing.mesh.internal/admin"))
		if p.status != "403" || p.decision == "" {
			t.Fatalf("%s, decision %q", p.status, p.decision)
		}
		w.awaitAudit("billing", "the decision", func(r auditLine) bool {
			return r.ID == p.decision && r.Decision == "deny" && r.Src == id("/ns/shop/sa/payment")
		})
	})
	refused := func(t *testing.T, r runReply) {
		t.Helper()
		if r.Code == 0 {
			t.Errorf("it is answered: %s", r.Output)
		}
	}
	t.Run("an address outside", func(t *testing.T) {
		refused(t, as(t, workloadUID, curl(outside)...))
		w.awaitAudit("payment", "the refusal", func(r auditLine) bool { return r.Reason == "no_route" && strings.HasPrefix(r.Dst, "host:203.0.113.7:") })
	})
	t.Run("nobody else is captured", func(t *testing.T) {
		if r := as(t, strangerUID, curl(outside)...); r.Code != 0 {
			t.Errorf("another user does not get out: %s", r.Output)
		}
		refused(t, call(strangerUID, v4, charges))
		refused(t, as(t, strangerUID, curl("--proxy", "http://127.0.0.1:15001", charges, "-f")...))
	})
	t.Run("kill -9 leaves nobody a way out", func(t *testing.T) {
		sidecar.kill()
		refused(t, call(workloadUID, v4, charges))
		refused(t, as(t, workloadUID, curl(outside)...))
		if r := w.capture("show"); r.Code != 0 || !strings.Contains(r.Output, "of this configuration yes") || !strings.Contains(r.Output, "held by               nobody") {
			t.Errorf("show: %d\n%s", r.Code, r.Output)
		}
		sidecar = w.startCapture()
		w.await("call billing again", func() bool { return call(workloadUID, v4, charges).Code == 0 })
		if again, _ := w.addresses("billing.mesh.internal"); again != v4 {
			t.Errorf("after a restart the address is %s, before %s", again, v4)
		}
	})
	t.Run("a takeover", func(t *testing.T) {
		next := w.start("payment", nil, "sidecar", "run", "--config", w.path("payment", "config.yaml"), "--takeover")
		calls := 0
		for over := false; !over; calls++ {
			if r := call(workloadUID, v4, charges); r.Code != 0 {
				t.Fatalf("a call failed after %d: %s", calls, r.Output)
			}
			select {
			case <-sidecar.done:
				over = true
			default:
			}
		}
		sidecar = next
		w.awaitReady(sidecar)
		sidecar.await("hold the rules", func() bool {
			return strings.Contains(w.capture("show").Output, "held by               a running sidecar")
		})
		if r := call(workloadUID, v4, charges); r.Code != 0 {
			t.Errorf("after the takeover: %s", r.Output)
		}
		t.Logf("%d calls during a takeover, none failed", calls)
	})
	t.Run("removal", func(t *testing.T) {
		if r := w.capture("remove"); r.Code != 1 || !strings.Contains(r.Output, "held by a running sidecar") || !strings.Contains(r.Output, "; next: stop the sidecar first") {
			t.Errorf("while the sidecar runs: %d %s", r.Code, r.Output)
		}
		if code := sidecar.stop(); code != 0 {
			t.Errorf("the sidecar ended with %d", code)
		}
		refused(t, as(t, workloadUID, curl(outside)...))
		if r := w.capture("remove"); r.Code != 0 || r.Output != "table inet sallyport: removed; nobody is captured\n" {
			t.Errorf("remove: %d %s", r.Code, r.Output)
		}
		if r := command(t, nft, "list", "ruleset"); r.Output != "" {
			t.Errorf("left behind:\n%s", r.Output)
		}
		if r := as(t, workloadUID, curl(outside)...); r.Code != 0 {
			t.Errorf("without rules the workload does not get out: %s", r.Output)
		}
	})
	t.Run("install, show and remove by hand", func(t *testing.T) {
		if r := w.capture("show"); r.Code != 1 || !strings.Contains(r.Output, "nobody is captured; next: sidecar capture install") {
			t.Errorf("show: %d %s", r.Code, r.Output)
		}
		dry := w.capture("install", "--dry-run")
		if dry.Code != 0 || !strings.Contains(dry.Output, fmt.Sprintf("meta skuid %d goto held", workloadUID)) || !strings.Contains(dry.Output, "ip route replace local 247.0.0.0/8 dev lo") {
			t.Errorf("dry run: %d %s", dry.Code, dry.Output)
		}
		if r := command(t, nft, "list", "ruleset"); r.Output != "" {
			t.Errorf("a dry run changed something:\n%s", r.Output)
		}
		for range 2 {
			if r := w.capture("install"); r.Code != 0 || !strings.Contains(r.Output, "table inet sallyport: in force, sha256:") {
				t.Errorf("install: %d %s", r.Code, r.Output)
			}
		}
		refused(t, as(t, workloadUID, curl(outside)...))
		for want, said := range []string{"removed; nobody is captured", "was not there"} {
			if r := w.capture("remove"); r.Code != 0 || !strings.Contains(r.Output, said) {
				t.Errorf("remove %d: %d %s", want, r.Code, r.Output)
			}
		}
	})
}

// answerOutside answers whoever gets past the sidecar.
func answerOutside(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("tcp", "203.0.113.7:8000")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(echo)}
	go func() { _ = s.Serve(ln) }()
	t.Cleanup(func() { s.Close() })
}

// TestCapturePostgreSQL has psql reach a database by its virtual address.
func TestCapturePostgreSQL(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	meshtest.Need(t, "psql")
	database, err := url.Parse(postgrestest.Start(t).Database(t))
	if err != nil {
		t.Fatal(err)
	}
	w, _, _ := capturedWorld(t, besideSocket(t, database.Query().Get("host")+"/.s.PGSQL.5432"),
		fmt.Sprintf("services:\n  - {name: billing, identity: %s, port: 5432, protocol: tcp}\n", id("/ns/shop/sa/billing")),
		fmt.Sprintf("p, db, in, %s, %s, 5432, CONNECT, -, -, allow\n", id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing")))
	v4, v6 := w.addresses("billing.mesh.internal")
	password, _ := database.User.Password()
	psql := func(uid uint32, host string) runReply {
		return as(t, uid, "psql", "-XAt", fmt.Sprintf("host=%s user=%s password='%s' dbname=%s sslmode=disable connect_timeout=10",
			host, database.User.Username(), password, strings.TrimPrefix(database.Path, "/")), "-c", "select 6 * 7")
	}
	w.await("the way to the database", func() bool { return psql(workloadUID, v4).Code == 0 })
	for _, host := range []string{v4, v6} {
		if r := psql(workloadUID, host); strings.TrimSpace(r.Output) != "42" {
			t.Errorf("psql at %s says %q", host, r.Output)
		}
	}
	if r := psql(strangerUID, v4); r.Code == 0 {
		t.Errorf("another user is served: %s", r.Output)
	}
	w.rewrite(w.path("policies", "access.csv"), "# nobody\n")
	// The service's sidecar may hear of the edit first, and refuse.
	w.await("the refusal by the caller's own sidecar", func() bool {
		refused := psql(workloadUID, v4).Code != 0
		return refused && slices.ContainsFunc(w.audit("payment"), func(r auditLine) bool { return r.Reason == "no_route" && r.Dst == "host:"+v4+":5432" })
	})
}

// TestCaptureInbound has another machine speak to a workload past its sidecar.
func TestCaptureInbound(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	meshtest.Need(t, "curl")
	peer := otherMachine(t)
	w := newWorld(t, time.Minute)
	w.startIssuer()
	bill := &node{name: "billing"}
	w.join(bill)
	bill.in, bill.app = "[::]:15006", "127.0.0.1:8080" // of both families
	w.write(bill.name, w.sidecarConfig(bill, w.token(bill.name))+fmt.Sprintf("capture: {everyone: true, sidecar_user: \"%d\", inbound_direct: [8001], hold: true}\n", os.Getuid()))
	conf, err := os.ReadFile(w.path(bill.name, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	w.rewrite(w.path(bill.name, "config.yaml"), strings.NewReplacer(
		"outbound:\n  listen: "+bill.out, "outbound:\n  listen: 127.0.0.1:15001", `app: "127.0.0.1:8080"`, `app: "127.0.0.1:8080", advertise: "10.77.0.1:15006"`).Replace(string(conf)))
	w.startNode(bill)
	for _, addr := range []string{"10.77.0.1:8000", "10.77.0.1:8001", "[fd77::1]:8001"} { // what the application opens beside
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: http.HandlerFunc(echo)}
		go func() { _ = s.Serve(ln) }()
		t.Cleanup(func() { s.Close() })
	}
	for _, open := range []string{"10.77.0.1:8001", "[fd77::1]:8001"} {
		if r := peer("curl", "-sS", "--max-time", "10", "http://"+open+"/"); r.Code != 0 {
			t.Errorf("%s, an exception: %s", open, r.Output)
		}
	}
	elsewhere := []string{"10.77.0.1:8080", "10.77.0.1:8000", "10.77.0.1:9", "[fd77::1]:8080", "[fd77::1]:9"}
	for _, addr := range append(elsewhere, "10.77.0.1:15006", "[fd77::1]:15006") {
		if r := peer("curl", "-sS", "--max-time", "10", "http://"+addr+"/"); r.Code == 0 {
			t.Errorf("%s answers clear text: %s", addr, r.Output)
		}
	}
	for _, addr := range elsewhere {
		w.awaitAudit("billing", "the refusal at "+addr, func(r auditLine) bool {
			return r.Kind == "tls" && r.Reason == "handshake" && strings.HasSuffix(r.Detail, "; the connection was going to "+addr)
		})
	}
}

// otherMachine is a network namespace at the other end of a cable, whose
// addresses are 10.77.0.2 and fd77::2, ours 10.77.0.1 and fd77::1, and runs
// programs there.
func otherMachine(t *testing.T) func(args ...string) runReply {
	t.Helper()
	ip, enter := meshtest.Need(t, "ip"), meshtest.Need(t, "nsenter")
	holder := exec.CommandContext(t.Context(), meshtest.Need(t, "unshare"), "-n", "sh", "-c", "echo up; exec cat")
	in, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = holder.Wait()
	})
	if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	pid := fmt.Sprint(holder.Process.Pid)
	there := func(args ...string) runReply {
		return command(t, enter, append([]string{"-n", "-t", pid}, args...)...)
	}
	for _, r := range []runReply{
		command(t, ip, "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", pid), command(t, ip, "addr", "add", "10.77.0.1/24", "dev", "near"),
		command(t, ip, "addr", "add", "fd77::1/64", "dev", "near", "nodad"), there(ip, "addr", "add", "fd77::2/64", "dev", "far", "nodad"),
		command(t, ip, "link", "set", "near", "up"), there(ip, "addr", "add", "10.77.0.2/24", "dev", "far"), there(ip, "link", "set", "far", "up"),
	} {
		if r.Code != 0 {
			t.Fatal(r.Output)
		}
	}
	return there
}
