package test

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// TestHop looks at the wire between two real sidecars: what they agree on with
// each other, with openssl and with nginx in place of one of them.
func TestHop(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	meshtest.Need(t, "openssl")
	nginx := meshtest.Need(t, "nginx")
	w := newWorld(t, time.Hour)
	w.startIssuer()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.join(pay)
	billing, payment := w.startNode(bill), w.startNode(pay)
	const url = "http://billing.mesh.internal/v1/charges"
	w.awaitReach(payment, url)

	t.Run("calls at once share a connection, and each is judged", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				args := curl("-d", "{}", url)
				if i%2 == 1 {
					args = curl("-X", "DELETE", url+"/7")
				}
				p := read(t, ask[runReply](payment, "/run", args))
				if i%2 == 0 {
					isEcho(t, p, "POST", "/v1/charges", id("/ns/shop/sa/payment"))
					return
				}
				decision := isRefusal(t, p)
				w.awaitAudit("billing", "decision "+decision, func(r auditLine) bool { return r.ID == decision && r.Decision == "deny" })
			})
		}
		wg.Wait()
		if n := connections(t, bill.in); n != 1 {
			t.Errorf("%d connections lead to the sidecar, want 1", n)
		}
	})

	identity := func(name string, h *hand) []string {
		s := ask[svidReply](h, "/svid", struct{}{})
		for file, text := range map[string]string{"leaf": s.Leaf, "rest": s.Rest, "key": s.Key, "roots": s.BundlePEM, "chain": s.Leaf + s.Rest} {
			w.put(w.path(name+"."+file), text)
		}
		return []string{"-cert", w.path(name + ".leaf"), "-cert_chain", w.path(name + ".rest"), "-key", w.path(name + ".key"), "-CAfile", w.path(name + ".roots")}
	}
	client := append([]string{"s_client", "-connect", bill.in, "-verify_return_error", "-ign_eof"}, identity("payment", payment)...)
	const request = "GET /v1/charges/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nConnection: close\r\n\r\n"
	t.Run("a peer of another make gets http/1.1, or h2 if it can", func(t *testing.T) {
		out, err := talk(t, request, append(client, "-alpn", "http/1.1")...)
		if !strings.Contains(out, "ALPN protocol: http/1.1") || !strings.Contains(out, "HTTP/1.1 200 OK") {
			t.Errorf("offering http/1.1 (%v):\n%s", err, out)
		}
		for _, offer := range []string{"h2,http/1.1", "http/1.1,h2"} {
			out, err := talk(t, request, append(client, "-alpn", offer)...)
			if !strings.Contains(out, "ALPN protocol: h2") || strings.Contains(out, "HTTP/1.1") {
				t.Errorf("offering %s (%v):\n%s", offer, err, out)
			}
		}
	})
	t.Run("what breaks the protocol is cut off, and nothing else", func(t *testing.T) {
		out, _ := talk(t, request, append(client, "-alpn", "sallyport/1")...)
		if !strings.Contains(out, "ALPN protocol: sallyport/1") || strings.Contains(out, "HTTP/1.1") {
			t.Errorf("HTTP/1.1 without frames got:\n%s", out)
		}
		isEcho(t, read(t, ask[runReply](payment, "/run", curl("-d", "{}", url))), "POST", "/v1/charges", id("/ns/shop/sa/payment"))
	})
	t.Run("a service of another make is called over http/1.1", func(t *testing.T) {
		identity("billing", billing)
		billing.kill()
		w.serveAs(nginx, bill.in, "billing")
		payment.await("reach nginx", func() bool {
			p := read(t, ask[runReply](payment, "/run", curl(url)))
			return p.status == "200" && strings.Contains(p.body, "nginx knows SUCCESS")
		})
	})
}

// connections counts the established TCP connections to an address.
func connections(t *testing.T, addr string) (n int) {
	t.Helper()
	var port int
	if _, err := fmt.Sscanf(addr[strings.LastIndex(addr, ":")+1:], "%d", &port); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 3 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) && f[3] == "01" {
			n++
		}
	}
	return n
}

// serveAs has nginx be the service whose SVID was put into files of that name.
func (w *world) serveAs(program, addr, name string) {
	w.t.Helper()
	if err := os.Chmod(w.dir, 0o755); err != nil { // its workers are other users when it is root
		w.t.Fatal(err)
	}
	dir := w.path("as-" + name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	file := w.path(name + ".nginx")
	w.put(file, fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log stderr;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  server {
    listen %[2]s ssl; ssl_protocols TLSv1.3;
    ssl_certificate %[3]s.chain; ssl_certificate_key %[3]s.key;
    ssl_client_certificate %[3]s.roots; ssl_verify_client on; ssl_verify_depth 3;
    location / { return 200 "nginx knows $ssl_client_verify"; }
  }
}
`, dir, addr, w.path(name)))
	w.serveBy(addr, program, "-p", dir, "-e", "stderr", "-c", file)
}
