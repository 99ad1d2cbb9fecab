package test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// roleTunnels has this program open tunnels until the file that it is given has
// gone, and say what became of them.
const roleTunnels = "tunnels"

// tunnelCounts is what became of the tunnels of one run.
type tunnelCounts struct {
	Made   int64 // opened, used and closed
	Failed int64 // not opened
	Broken int64 // opened, and ended while in use
	Held   int64 // open all the time, and in use to the end
	Lost   int64 // open for long, and ended before
	Why    string
}

// tunnelling opens tunnels one after the other by some, and holds others.
type tunnelling struct {
	proxy, host, file string

	mu     sync.Mutex // guards counts
	counts tunnelCounts
	held   atomic.Int64
}

func openTunnels() int {
	w := &tunnelling{proxy: os.Args[1], host: os.Args[2], file: os.Args[3]}
	var all sync.WaitGroup
	for range 4 {
		all.Go(w.hold)
		all.Go(w.again)
	}
	all.Wait()
	_ = json.NewEncoder(os.Stdout).Encode(w.counts)
	return 0
}

func (w *tunnelling) on() bool {
	_, err := os.Stat(w.file)
	return err == nil
}

func (w *tunnelling) count(n *int64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if *n++; err != nil && w.counts.Why == "" {
		w.counts.Why = err.Error()
	}
}

func (w *tunnelling) open() (net.Conn, *bufio.Reader, error) {
	c, err := net.Dial("tcp", w.proxy)
	if err != nil {
		return nil, nil, err
	}
	_ = c.SetDeadline(time.Now().Add(within))
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", w.host)
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodConnect})
	if err == nil && resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(resp.Body)
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	return c, br, nil
}

// say has a line come back.
func (w *tunnelling) say(c net.Conn, br *bufio.Reader) error {
	_ = c.SetDeadline(time.Now().Add(within))
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return err
	}
	line, err := br.ReadString('\n')
	if err == nil && line != "hello\n" {
		err = fmt.Errorf("answered %q", line)
	}
	return err
}

// again opens one tunnel after the other.
func (w *tunnelling) again() {
	for w.on() {
		c, br, err := w.open()
		if err != nil {
			w.count(&w.counts.Failed, err)
			time.Sleep(10 * time.Millisecond) // a rate
			continue
		}
		if err := w.say(c, br); err != nil {
			w.count(&w.counts.Broken, err)
		} else {
			w.count(&w.counts.Made, nil)
		}
		c.Close()
	}
}

// hold opens one, and another when that ends too early. It is there before a file
// says that all of them are.
func (w *tunnelling) hold() {
	counted := false
	for w.on() {
		c, br, err := w.open()
		if err != nil {
			w.count(&w.counts.Failed, err)
			time.Sleep(10 * time.Millisecond) // a rate
			continue
		}
		if !counted && w.held.Add(1) == 4 {
			_ = os.WriteFile(w.file+".held", nil, 0o600)
		}
		counted = true
		for err == nil && w.on() {
			err = w.say(c, br)
			time.Sleep(10 * time.Millisecond) // a rate, not a wait for anything
		}
		c.Close()
		if err != nil {
			w.count(&w.counts.Lost, err)
		} else {
			w.count(&w.counts.Held, nil)
		}
	}
}

// serveEcho sends back what comes.
func serveEcho(t *testing.T) (addr string) {
	t.Helper()
	return serves(t, func(c net.Conn) { _, _ = io.Copy(c, c) })
}

// serves has serve speak with whoever connects, and gives the address.
func serves(t *testing.T, serve func(net.Conn)) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}()
	return ln.Addr().String()
}

// gatewaysWorld is payment with two gateways.
type gatewaysWorld struct {
	*world
	payment *hand
	node    *node
	addr    [2]string
	gates   [2]*proc
	names   [2]string
}

func newGatewaysWorld(t *testing.T) *gatewaysWorld {
	t.Helper()
	w := &gatewaysWorld{world: newWorld(t, time.Minute), names: [2]string{"gateway", "gateway2"}}
	file := w.path("policies", "entries.yaml")
	entries, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	w.rewrite(file, string(entries)+fmt.Sprintf("  - {spiffe_id: %s, parent_id: %s, selectors: [\"self:true\"]}\n", id("/ns/edge/sa/gateway"), id("/spire/agent/join_token/gateway2")))
	if err := os.RemoveAll(w.path("policies", "tests")); err != nil { // they say that payment leaves no mesh
		t.Fatal(err)
	}
	w.extend("access.csv", fmt.Sprintf("p, echo-out, out, %[1]s, host:echo.test, 7, CONNECT, -, -, allow\np, metered-out, out, %[1]s, host:metered.test, 7, CONNECT, -, -, allow\n", id("/ns/shop/sa/payment")))
	w.extend("egress.yaml", fmt.Sprintf("  - host: echo.test\n    proto: tcp\n    private: [127.0.0.1/32]\n    route: {endpoints: [%[1]q]}\n"+
		"  - host: metered.test\n    proto: tcp\n    private: [127.0.0.1/32]\n    budget: {conns: 6}\n    route: {endpoints: [%[1]q]}\n", serveEcho(t)))
	w.startIssuer()
	for i := range w.gates {
		w.addr[i] = freePort(t)
		conf := strings.Replace(w.proxyConfig(w.names[i], w.token(w.names[i])), "timeout: 2s", "timeout: 30s", 1)
		w.write(w.names[i], conf+fmt.Sprintf("listen: %s\nresolvers: [%q]\n", w.addr[i], freePort(t)))
		w.startGate(i)
	}
	w.node = &node{name: "payment", gateways: w.addr[0]}
	w.join(w.node)
	conf, err := os.ReadFile(w.path("payment", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	w.rewrite(w.path("payment", "config.yaml"), strings.Replace(string(conf), fmt.Sprintf("addresses: [%q]", w.addr[0]), fmt.Sprintf("addresses: [%q, %q]", w.addr[0], w.addr[1]), 1))
	w.payment = w.startNode(w.node)
	return w
}

func (w *gatewaysWorld) startGate(i int) {
	w.t.Helper()
	w.gates[i] = w.start(w.names[i], nil, "gateway", "run", "--config", w.path(w.names[i], "config.yaml"))
	w.awaitReady(w.gates[i])
}

// opened is how many tunnels a gateway has opened.
func (w *gatewaysWorld) opened(i int) (n int) {
	for _, r := range w.audit(w.names[i]) {
		if r.Kind == "egress_open" {
			n++
		}
	}
	return n
}

// while opens tunnels during something that is done to the gateways, which begins
// when tunnels are held.
func (w *gatewaysWorld) while(name, host string, do func()) tunnelCounts {
	w.t.Helper()
	self, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	file := filepath.Join(w.dir, name)
	w.put(file, "")
	reply := make(chan runReply, 1)
	go func() {
		r, err := try[runReply](w.payment, "/run", []string{"env", envRole + "=" + roleTunnels, self, w.node.out, host + ":7", file})
		if err != nil {
			r.Output = err.Error()
		}
		reply <- r
	}()
	w.await("hold tunnels", func() bool { _, err := os.Stat(file + ".held"); return err == nil })
	do()
	if err := os.Remove(file); err != nil {
		w.t.Fatal(err)
	}
	r := <-reply
	var c tunnelCounts
	if err := json.Unmarshal([]byte(r.Output), &c); err != nil {
		w.t.Fatalf("%v: %s", err, r.Output)
	}
	w.t.Logf("%s: %d tunnels made, %d failed, %d broken; of those held for long %d to the end, %d lost; %s", name, c.Made, c.Failed, c.Broken, c.Held, c.Lost, c.Why)
	return c
}

// more waits until a gateway has opened that many tunnels more.
func (w *gatewaysWorld) more(i, n int) {
	w.t.Helper()
	was := w.opened(i)
	// A gateway that was away is put aside for 30 s, or twice that.
	w.awaitFor(4*within, fmt.Sprintf("have %s open %d tunnels more", w.names[i], n), func() bool { return w.opened(i) >= was+n })
}

// TestEgressGateways has one of two gateways crash and the other one leave in
// order, under tunnels.
func TestEgressGateways(t *testing.T) {
	t.Parallel()
	w := newGatewaysWorld(t)
	c := w.while("spread", "echo.test", func() {
		w.more(0, 20)
		w.more(1, 20)
	})
	if c.Made < 40 || c.Failed+c.Broken+c.Lost > 0 || c.Held != 4 {
		t.Errorf("two gateways: %+v", c)
	}
	c = w.while("metered", "metered.test", func() {
		for _, name := range w.names {
			w.awaitAudit(name, "a refusal by the budget", func(r auditLine) bool { return r.Reason == "budget" && r.Dst == "host:metered.test" })
		}
		w.more(0, 20)
		w.more(1, 20)
	})
	// For a moment after the first tunnels more are open than the budget has, until
	// both gateways know of each other.
	if c.Failed < c.Made/4 || c.Broken+c.Lost > 0 || c.Held != 4 {
		t.Errorf("8 tunnels at a time under a budget of 6 over two gateways: %+v", c)
	}
	c = w.while("killed", "echo.test", func() {
		w.more(1, 10)
		w.gates[1].kill()
		w.more(0, 40)
	})
	// What it carried is lost: nobody else has the connections outside.
	if c.Made < 40 || c.Failed > 0 || c.Lost > 4 || c.Broken > 4 || c.Held != 4 {
		t.Errorf("one is killed: %+v", c)
	}
	w.startGate(1)
	c = w.while("back", "echo.test", func() { w.more(1, 10) })
	if c.Failed+c.Broken+c.Lost > 0 {
		t.Errorf("it is back: %+v", c)
	}
	c = w.while("drained", "echo.test", func() {
		w.more(0, 10)
		_ = w.gates[0].cmd.Process.Signal(syscall.SIGTERM)
		w.more(1, 60)
	})
	if c.Made < 60 || c.Failed+c.Broken+c.Lost > 0 || c.Held != 4 {
		t.Errorf("one drains: %+v", c)
	}
	select {
	case <-w.gates[0].done:
	case <-time.After(within):
		t.Fatal("the gateway does not end with its last tunnel")
	}
	if code := w.gates[0].cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("the gateway that drained ends with %d", code)
	}
}
