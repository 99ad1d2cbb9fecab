package test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// h2spec sums up TestH2spec by listener; it is printed with the others.
var h2spec = &conformSum{conformResult: conformResult{Name: "h2spec", OK: true}}

// TestH2spec has h2spec try the listeners that speak HTTP/2: an outbound door by
// prior knowledge, as the workload, and the inbound one by ALPN, as a peer with an
// SVID, which a relay shows in its place. The door is that of one service: h2spec
// names none, and what another door refuses it refuses before it has seen what is
// wrong with the rest.
func TestH2spec(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	program := buildTool(t, "h2spec", "github.com/summerwind/h2spec/cmd/h2spec", "h2spec")
	w := newWorld(t, time.Hour)
	w.startIssuer()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.join(pay)
	w.startNode(bill)
	payment := w.startNode(pay)
	const path = "/v1/charges"
	w.awaitReach(payment, "http://billing.mesh.internal"+path)
	s := ask[svidReply](payment, "/svid", struct{}{})
	cert, err := tls.X509KeyPair([]byte(s.Leaf+s.Rest), []byte(s.Key))
	if err != nil {
		t.Fatal(err)
	}
	// Who answers is not the matter here; what it takes is.
	relayed := relayTLS(t, bill.in, &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}})
	asWorkload := func(args []string) runReply { return ask[runReply](payment, "/run", args) }
	// What is no preface is HTTP/1.1 to a door that takes both, and gets 400.
	preface := []string{"Sends invalid connection preface"}
	for _, l := range []struct {
		name, addr string
		run        func(args []string) runReply
		may        []string // what may fail
	}{
		{"outbound", pay.billing, asWorkload, preface},
		{"inbound", relayed, func(args []string) runReply { return command(t, args[0], args[1:]...) }, nil},
	} {
		t.Run(l.name, func(t *testing.T) {
			host, port, err := net.SplitHostPort(l.addr)
			if err != nil {
				t.Fatal(err)
			}
			r := l.run([]string{program, "-h", host, "-p", port, "-P", path, "-o", "5"})
			h2spec.add(counted(t, l.name, r, l.may))
		})
	}
}

var (
	h2specCounts = regexp.MustCompile(`(\d+) tests, (\d+) passed, (\d+) skipped, (\d+) failed`)
	h2specFailed = regexp.MustCompile(`× \d+: (.*)`)
)

// counted reads what h2spec printed at its end.
func counted(t *testing.T, listener string, r runReply, may []string) conformResult {
	t.Helper()
	var tried, passed, skipped, failed int
	line := h2specCounts.FindString(r.Output)
	if _, err := fmt.Sscanf(line, "%d tests, %d passed, %d skipped, %d failed", &tried, &passed, &skipped, &failed); err != nil {
		t.Fatalf("h2spec printed:\n%s", r.Output)
	}
	ok := tried >= 145 && passed+failed == tried
	for _, m := range h2specFailed.FindAllStringSubmatch(r.Output, -1) {
		ok = ok && slices.Contains(may, m[1])
	}
	if !ok {
		t.Errorf("%s:\n%s", line, r.Output)
	}
	c := conformResult{Name: "h2spec", OK: ok, Verdicts: []conformVerdict{{Name: listener, OK: ok, Detail: line}}}
	c.Cases.Tried, c.Cases.Passed, c.Cases.Skipped, c.Cases.Failed = tried, passed, skipped, failed
	return c
}

// buildTool builds a program of a module in tools/, beside our own programs, and
// gives its path.
func buildTool(t *testing.T, tool, pkg, program string) string {
	t.Helper()
	program = filepath.Join(bin, program)
	cmd := exec.Command("go", "build", "-trimpath", "-o", program, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // as "make test" did before
	cmd.Dir = filepath.Join("..", "tools", tool)
	if out, err := cmd.CombinedOutput(); err != nil {
		if os.Getenv("CI") == "" && bytes.Contains(out, []byte("proxy")) {
			t.Skipf("%s does not build without its modules: %s", tool, out)
		}
		t.Fatalf("build %s: %v\n%s", tool, err, out)
	}
	return program
}

// relayTLS listens for clear connections and speaks TLS to addr for them.
func relayTLS(t *testing.T, addr string, cfg *tls.Config) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer near.Close()
				far, err := tls.Dial("tcp", addr, cfg)
				if err != nil {
					return
				}
				defer far.Close()
				said := make(chan struct{})
				go func() {
					defer close(said)
					_, _ = io.Copy(far, near)
					far.Close()
					// To close on what was not read would reset what is on its way there.
					_, _ = io.Copy(io.Discard, near)
				}()
				_, _ = io.Copy(near, far)
				_ = near.(*net.TCPConn).CloseWrite()
				_ = near.SetReadDeadline(time.Now().Add(within))
				<-said
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
	return ln.Addr().String()
}
