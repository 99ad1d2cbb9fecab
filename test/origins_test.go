package test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"sallyport/internal/meshtest"
)

// An origin is a host outside at two addresses, the first of which is behind a
// network that can be made bad.
type origin struct {
	backend // of the first
	host    string
	ca      string
	at      [2]string
	second  atomic.Int64 // what the second has seen
}

func (w *world) startOrigin(host string) *origin {
	w.t.Helper()
	o := &origin{host: host, backend: backend{t: w.t}}
	file := w.path(host + ".pem")
	cert := w.certify(host, file)
	pem, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	o.ca = strings.ReplaceAll(strings.TrimSpace(string(pem)), "\n", "\n      ")
	serve := func(seen *atomic.Int64, mayFail bool) string {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			seen.Add(1)
			if h := o.answer.Load(); mayFail && h != nil {
				(*h)(rw, r)
				return
			}
			echo(rw, r)
		}))
		s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
		s.StartTLS()
		w.t.Cleanup(s.CloseClientConnections)
		return s.Listener.Addr().String()
	}
	first := serve(&o.seen, true)
	o.at = [2]string{freePort(w.t), serve(&o.second, false)}
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(prometheus.NewRegistry()), zerolog.Nop())
	o.proxy = toxiproxy.NewProxy(server, host, o.at[0], first)
	o.listen()
	w.t.Cleanup(o.proxy.Stop)
	return o
}

// policy describes the host, with a route that names its addresses %[1]q and %[2]q.
func (o *origin) policy(route string) string {
	return fmt.Sprintf("  - host: %s\n    tls: originate\n    private: [127.0.0.1/32]\n    ca: |\n      %s\n    route: %s\n", o.host, o.ca, fmt.Sprintf(route, o.at[0], o.at[1]))
}

// asked is the status of a call, and what each address has seen of it.
func (o *origin) asked(h *hand, method string) (status string, first, second int64) {
	o.t.Helper()
	a, b := o.seen.Load(), o.second.Load()
	p := read(o.t, ask[runReply](h, "/run", curl("-X", method, "-d", "{}", "http://"+o.host+"/v1/charges")))
	return p.status, o.seen.Load() - a, o.second.Load() - b
}

func (o *origin) want(h *hand, method, status string, first, second int64) {
	o.t.Helper()
	if s, a, b := o.asked(h, method); s != status || a != first || b != second {
		o.t.Errorf("%s %s: %s, the first has seen %d requests and the second %d; want %s, %d, %d", method, o.host, s, a, b, status, first, second)
	}
}

// startTinyproxy is a proxy that nobody here wrote, and who may use it.
func (w *world) startTinyproxy(user, password string) string {
	w.t.Helper()
	program := meshtest.Need(w.t, "tinyproxy")
	addr := freePort(w.t)
	host, port, _ := strings.Cut(addr, ":")
	conf := w.path("tinyproxy.conf")
	w.put(conf, fmt.Sprintf("Port %s\nListen %s\nTimeout 60\nMaxClients 20\nBasicAuth %s %s\n", port, host, user, password))
	p := w.launch("tinyproxy", nil, exec.Command(program, "-d", "-c", conf))
	p.await("listen", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return addr
}

// sealTinyproxy puts HAProxy before a proxy, which speaks TLS for it, and gives the
// authority of its certificate, in a line.
func (w *world) sealTinyproxy(to string) (addr, ca string) {
	w.t.Helper()
	program := meshtest.Need(w.t, "haproxy")
	file, addr := w.path("sealed.pem"), freePort(w.t)
	cert := w.certify("127.0.0.1", file)
	pub, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(w.path("haproxy.pem"), string(pub)+string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
	w.put(w.path("haproxy.cfg"), fmt.Sprintf(`defaults
	mode tcp
	timeout connect 5s
	timeout client 1m
	timeout server 1m
listen sealed
	bind %s ssl crt %s
	server tinyproxy %s
`, addr, w.path("haproxy.pem"), to))
	p := w.launch("haproxy", nil, exec.Command(program, "-db", "-f", w.path("haproxy.cfg")))
	p.await("listen", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return addr, strconv.Quote(string(pub))
}

// TestEgressOrigins is what a gateway does when hosts outside are late, fail, or are
// behind another proxy.
func TestEgressOrigins(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	shop, shared, broken, far := w.startOrigin("shop.test"), w.startOrigin("shared.test"), w.startOrigin("broken.test"), w.startOrigin("far.test")
	deep, astray := w.startOrigin("deep.test"), w.startOrigin("astray.test")
	parent := w.startTinyproxy("gateway", "let-me-out")
	sealed, sealedCA := w.sealTinyproxy(parent)
	w.put(w.path("parent.key"), "gateway:let-me-out\n")
	const failover = "endpoints: [{address: %q, weight: 1}, {address: %q, priority: 1}]"
	w.extend("egress.yaml", shop.policy("{"+failover+", retry: {attempts: 1}, timeouts: {connect: 2s, backend_request: 4s}}")+
		shared.policy("{endpoints: [{address: %q, weight: 3}, {address: %q, weight: 1}]}")+
		broken.policy("{endpoints: [%q, %q], breaker: {consecutive: 3, open: 1s}}")+
		far.policy("{endpoints: [%q, %q], proxies: [{address: "+`"`+parent+`"`+", credentials: parent}]}")+
		deep.policy("{endpoints: [%q, %q], proxies: [{address: \"https://"+sealed+"\", credentials: parent, ca: "+sealedCA+"}]}")+
		astray.policy("{endpoints: [%q, %q], proxies: [{address: \"https://"+sealed+"\", credentials: parent}]}"))
	for _, o := range []*origin{shop, shared, broken, far, deep, astray} {
		w.extend("access.csv", "p, bill-"+o.host+", out, "+id("/ns/shop/sa/billing")+", host:"+o.host+", 443, GET|POST, /v1/**, -, allow\n")
	}
	w.startIssuer()
	gw := freePort(t)
	w.write("gateway", w.proxyConfig("gateway", w.token("gateway"))+
		fmt.Sprintf("listen: %s\nresolvers: [%q]\nsecrets: [{name: parent, file: %s}]\n", gw, freePort(t), w.path("parent.key")))
	w.awaitReady(w.start("gateway", nil, "gateway", "run", "--config", w.path("gateway", "config.yaml")))
	bill := &node{name: "billing", gateways: gw}
	w.join(bill)
	billing := w.startNode(bill)

	t.Run("the first priority has all requests while it is well", func(t *testing.T) {
		shop.want(billing, "POST", "200", 1, 0)
	})
	t.Run("what breaks off is repeated elsewhere if that is safe", func(t *testing.T) {
		shop.with(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, func() {
			shop.want(billing, "POST", "502", 1, 0)
			shop.want(billing, "GET", "200", 1, 1)
		})
	})
	t.Run("so is what takes too long", func(t *testing.T) {
		over := make(chan struct{})
		defer close(over)
		shop.with(func(http.ResponseWriter, *http.Request) { <-over }, func() {
			shop.want(billing, "POST", "504", 1, 0)
			shop.want(billing, "GET", "200", 1, 1)
		})
	})
	t.Run("the next priority has them when it is dead", func(t *testing.T) {
		shop.proxy.Stop()
		shop.want(billing, "POST", "200", 0, 1)
		shop.want(billing, "GET", "200", 0, 1)
		shop.listen()
	})
	t.Run("weights share", func(t *testing.T) {
		const n = 120
		r := ask[runReply](billing, "/run", []string{"curl", "-sS", "--max-time", "60", "-o", "/dev/null", fmt.Sprintf("http://shared.test/v1/[1-%d]", n)})
		if r.Code != 0 {
			t.Fatal(r.Output)
		}
		// Seven standard deviations.
		if a, b := shared.seen.Load(), shared.second.Load(); a+b != n || a < 90-33 || a > 90+29 {
			t.Errorf("%d and %d requests", a, b)
		}
	})
	t.Run("a host that keeps failing is cut off, and called again", func(t *testing.T) { w.cutOff(t, billing, broken) })
	t.Run("another proxy leads out", func(t *testing.T) {
		far.want(billing, "POST", "200", 1, 0)
		w.awaitAudit("gateway", "the request", func(r auditLine) bool {
			return r.Kind == "egress_close" && r.Dst == "host:far.test" && strings.Contains(r.Detail, "to "+far.at[0]+" through "+parent)
		})
	})
	t.Run("one that is spoken to over TLS does", func(t *testing.T) {
		deep.want(billing, "POST", "200", 1, 0)
		w.awaitAudit("gateway", "the request", func(r auditLine) bool {
			return r.Kind == "egress_close" && r.Dst == "host:deep.test" && strings.Contains(r.Detail, "to "+deep.at[0]+" through "+sealed)
		})
	})
	t.Run("unless nobody knows its authority", func(t *testing.T) {
		astray.want(billing, "POST", "502", 0, 0)
		w.awaitAudit("gateway", "the refusal", func(r auditLine) bool { return r.Dst == "host:astray.test" && r.Reason == "certificate" })
	})
}

// cutOff looks at the breaker of a host from all sides.
func (w *world) cutOff(t *testing.T, billing *hand, broken *origin) {
	const gauge = `sallyport_breaker_open{dst="host:broken.test"} `
	broken.with(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(500) }, func() {
		for range 3 {
			broken.want(billing, "POST", "500", 1, 0)
		}
		w.await("find the breaker open", func() bool {
			return strings.Contains(w.metrics("gateway"), gauge+"1") && strings.Contains(w.sallyport("ejections").Output, "host:broken.test")
		})
		w.await("find the host cut off", func() bool { // unless it is just the probe's turn
			status, first, second := broken.asked(billing, "POST")
			return status == "503" && first+second == 0
		})
	})
	w.await("find it called again", func() bool {
		status, first, second := broken.asked(billing, "POST")
		if first+second > 1 {
			t.Errorf("a POST was sent %d times", first+second)
		}
		return status == "200"
	})
	w.await("find the breaker closed", func() bool { return strings.Contains(w.metrics("gateway"), gauge+"0") })
}
