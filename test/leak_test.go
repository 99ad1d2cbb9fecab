package test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sallyport/internal/leak"
	"sallyport/internal/meshtest"
)

// leaks reads what a leak test says, and fails unless its exit code fits.
func leaks(t *testing.T, r runReply) (*leak.Report, []string) {
	t.Helper()
	out, _, _ := strings.Cut(r.Output, "\nsallyport:") // the complaint on stderr
	var rep leak.Report
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&rep); err != nil {
		t.Fatalf("exit code %d: %v\n%s", r.Code, err, r.Output)
	}
	var leaked []string
	for _, o := range rep.Ways {
		if o.Result == leak.Leaked || o.Result == leak.Unknown {
			leaked = append(leaked, o.Way)
		}
		t.Logf("%-14s %-8s %s", o.Way, o.Result, o.Detail)
	}
	if want := min(len(leaked), 1); r.Code != want {
		t.Errorf("exit code %d, want %d\n%s", r.Code, want, r.Output)
	}
	return &rep, leaked
}

// TestLeakCaptured tries every way out of a captured workload, and, so that it
// is known that they lead somewhere, those of somebody who is not captured.
func TestLeakCaptured(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	meshtest.Need(t, "nft")
	ip := meshtest.Need(t, "ip")
	const v4, v6 = "203.0.113.7:7777", "[2001:db8::7]:7777"
	if out, err := exec.CommandContext(t.Context(), ip, "addr", "add", "2001:db8::7/128", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(bin, "sallyport"))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "sp-leak-") // where every user may run it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	program := filepath.Join(dir, "sallyport")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(program, b, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"add", "out0", "type", "veth", "peer", "name", "out0p"}, {"set", "out0", "up"}, {"set", "out0p", "up"}} { // for frames
		if r := command(t, ip, append([]string{"link"}, args...)...); r.Code != 0 {
			t.Fatal(r.Output)
		}
	}
	w, _, _ := capturedWorld(t, "", "", "")
	four, six := w.start("witness", nil, "sallyport", "egress", "witness", "--listen", v4), w.start("witness6", nil, "sallyport", "egress", "witness", "--listen", v6)
	try := func(uid uint32, more ...string) runReply {
		return as(t, uid, append([]string{program, "egress", "leak-test", "--witness", v4, "--witness", v6, "--timeout", "1s", "-o", "json", "--user", "0," + strconv.Itoa(strangerUID)}, more...)...)
	}
	for p, way := range map[*proc]string{four: "udp4", six: "udp6"} {
		p.await("listen", func() bool { return try(strangerUID, "--only", way).Code == 1 })
	}

	t.Run("who is not captured gets out", func(t *testing.T) {
		_, leaked := leaks(t, try(strangerUID))
		for _, way := range []string{"tcp4", "tcp6", "tcp4-in-6", "tcp-fast-open", "tcp-free-bind", "udp4", "udp6", "udp-lite"} {
			if !slices.Contains(leaked, way) {
				t.Errorf("%s does not get out", way)
			}
		}
	})
	t.Run("who is captured does not", func(t *testing.T) {
		before := four.out.String() + six.out.String()
		rep, leaked := leaks(t, try(workloadUID, "--timeout", "5s")) // a busy sidecar takes its time to refuse
		// The host of a virtual machine is no address, and what is bound to an
		// interface is dropped there without a word; docs/capture.md says so.
		if leaked = slices.DeleteFunc(leaked, func(way string) bool { return way == "vsock" || way == "tcp-device" }); len(leaked) > 0 || rep.Cases.Tried < 15 {
			t.Errorf("leaked %v, of %d ways", leaked, rep.Cases.Tried)
		}
		if after := four.out.String() + six.out.String(); after != before {
			t.Errorf("the witness has heard\n%s", after)
		}
	})
	t.Run("nor with every kind of socket", func(t *testing.T) {
		if leaked := leaksRaw(t, program, strangerUID); !slices.Contains(leaked, "packet") || !slices.Contains(leaked, "packet-direct") || !slices.Contains(leaked, "raw-ip") {
			t.Errorf("who is not captured gets out by %v", leaked)
		}
		if leaked := leaksRaw(t, program, workloadUID); len(leaked) > 0 {
			t.Errorf("leaked %v", leaked)
		}
	})
}

// leaksRaw tries the ways of somebody who may open sockets of any kind.
func leaksRaw(t *testing.T, program string, uid int) (leaked []string) {
	t.Helper()
	n := strconv.Itoa(uid)
	_, leaked = leaks(t, command(t, meshtest.Need(t, "setpriv"), "--reuid", n, "--regid", n, "--clear-groups", "--inh-caps", "+net_raw", "--ambient-caps", "+net_raw", "--",
		program, "egress", "leak-test", "--witness", "203.0.113.7:7777", "--timeout", "1s", "-o", "json", "--only", "packet,packet-direct,raw-icmp,raw-ip,raw-gre,tcp-mark"))
	return leaked
}

// TestLeakIsolated tries every way out of a network namespace that holds the
// sidecar's doors and nothing else.
func TestLeakIsolated(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	w.startIssuer()
	pay := &node{name: "payment"}
	w.join(pay)
	user := w.ordinary("payment")
	w.flags = []string{"--isolate"}
	payment := w.startWorkloadBy(pay.name, user, envListen+"="+pay.app)
	b, err := os.ReadFile(filepath.Join(bin, "sallyport"))
	if err != nil {
		t.Fatal(err)
	}
	program := w.path("sallyport")
	if err := os.WriteFile(program, b, 0o755); err != nil {
		t.Fatal(err)
	}
	rep, leaked := leaks(t, ask[runReply](payment, "/run", []string{program, "egress", "leak-test", "--witness", "192.0.2.7:7777", "--witness", "[2001:db8::7]:7777", "--timeout", "10s", "-o", "json"})) // a busy sidecar takes its time to refuse
	if len(leaked) > 0 || rep.Cases.Tried < 15 {
		t.Errorf("leaked %v, of %d ways", leaked, rep.Cases.Tried)
	}
}
