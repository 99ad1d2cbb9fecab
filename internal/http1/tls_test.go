package http1

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// tlsPair is a client and a server end of TLS over loopback.
func tlsPair(t *testing.T) (client, server *tls.Conn) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"a"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	a, b := meshtest.TCP(t)
	client = tls.Client(a, &tls.Config{RootCAs: roots, ServerName: "a", MinVersion: tls.VersionTLS13})
	server = tls.Server(b, &tls.Config{
		Certificates:           []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
	})
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return client, server
}

// TestOverTLS has TLS at both edges, as between two proxies: keep-alive, long
// bodies, an early response against a client that goes on sending, Stale.
func TestOverTLS(t *testing.T) {
	client, down := tlsPair(t)
	up, upstream := tlsPair(t)
	pooled := NewConn(up, Limits{})
	outcome := make(chan error, 1)
	go func() {
		_, err := proxy(NewConn(down, Limits{}), func() *Conn {
			if pooled.Stale() {
				t.Error("a live connection counts as stale")
			}
			return pooled
		})
		outcome <- err
	}()
	go func() {
		br := bufio.NewReader(upstream)
		for {
			req, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			if req.URL.Path == "/refuse" {
				_, _ = io.WriteString(upstream, "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
				return
			}
			b, _ := io.ReadAll(req.Body)
			resp := http.Response{StatusCode: 200, ProtoMajor: 1, ProtoMinor: 1, Body: io.NopCloser(bytes.NewReader(b)), ContentLength: int64(len(b))}
			_ = resp.Write(upstream)
		}
	}()
	br := bufio.NewReader(client)
	for _, size := range []int{0, 100, 1 << 20, 100} {
		req, _ := http.NewRequest("POST", "http://a/x", strings.NewReader(strings.Repeat("x", size)))
		go func() { _ = req.Write(client) }()
		resp, err := http.ReadResponse(br, req)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); len(b) != size || err != nil {
			t.Fatalf("%d bytes came back of %d, %v", len(b), size, err)
		}
	}
	go func() {
		_, _ = io.WriteString(client, "POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n")
		for b := make([]byte, 16<<10); ; {
			if _, err := client.Write(b); err != nil {
				return
			}
		}
	}()
	if resp, err := http.ReadResponse(br, nil); err != nil || resp.StatusCode != 413 || !resp.Close {
		t.Fatalf("%v, %v", resp, err)
	}
	if err := <-outcome; err != nil {
		t.Errorf("outcome %v", err)
	}
	if !pooled.Stale() {
		t.Error("a connection that was given up does not count as stale")
	}
}

// TestTimeoutDoesNotBreakTLS reads on after a deadline inside a record, as
// the re-armed waits do.
func TestTimeoutDoesNotBreakTLS(t *testing.T) {
	client, server := tlsPair(t)
	c, r := NewConn(server, Limits{IdleTimeout: 20 * time.Millisecond}), new(Request)
	if err := c.ReadRequest(r); err != ErrIdleTimeout {
		t.Fatalf("nothing sent: %v", err)
	}
	_, _ = io.WriteString(client, plainGet)
	for {
		switch err := c.ReadRequest(r); err {
		case ErrIdleTimeout:
			continue
		case nil:
		default:
			t.Fatal(err)
		}
		break
	}
	if string(r.Path) != "/x" {
		t.Errorf("path %q", r.Path)
	}
}
