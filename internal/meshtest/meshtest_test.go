package meshtest_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

func TestIdentitiesCompleteMutualTLS(t *testing.T) {
	ca := meshtest.NewCA(t, meshtest.TD)
	web, billing := meshtest.ID("/ns/shop/sa/web"), meshtest.ID("/ns/shop/sa/billing")
	a, b := meshtest.Pipe()
	defer a.Close()
	defer b.Close()
	server := tls.Server(b, svid.ServerTLS(meshtest.Source(t, ca, billing), func(id spiffeid.ID) error {
		if id != web {
			return errors.New("not web")
		}
		return nil
	}))
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	client := tls.Client(a, svid.ClientTLS(meshtest.Source(t, ca, web), billing))
	if err := client.Handshake(); err != nil {
		t.Fatalf("client: %v", err)
	}
	if err := <-done; err != nil {
		t.Fatalf("server: %v", err)
	}
	if id, err := svid.PeerID(client.ConnectionState()); id != billing || err != nil {
		t.Errorf("PeerID = %s, %v, want %s", id, err, billing)
	}
}

func TestIssuedIdentitiesVerifyUntilTheyExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := meshtest.NewCA(t, meshtest.TD)
		id := ca.Issue(t, meshtest.ID("/a"), time.Minute)
		got, err := svid.VerifyChain(id.Chain, ca.Bundle(), time.Now())
		if got != id.ID || err != nil {
			t.Errorf("VerifyChain = %s, %v", got, err)
		}
		time.Sleep(2 * time.Minute)
		if _, err := svid.VerifyChain(id.Chain, ca.Bundle(), time.Now()); err == nil {
			t.Error("an expired identity verified")
		}
		if _, err := svid.VerifyChain(id.Chain, meshtest.NewCA(t, meshtest.TD).Bundle(), time.Now().Add(-time.Minute)); err == nil {
			t.Error("an identity of another CA verified")
		}
	})
}

func TestPoliciesAndSnapshot(t *testing.T) {
	files := map[string]string{"services.yaml": `services:
  - name: billing
    identity: spiffe://demo.sallyport/ns/shop/sa/billing
    port: 8443
`}
	if p := meshtest.Policies(t, files); len(p.Services) != 1 || p.Services[0].Name != "billing" {
		t.Errorf("Services = %+v", p.Services)
	}
	s := meshtest.Snapshot(t, files, meshtest.Endpoint(t, "billing", "10.0.0.1:15006"))
	if got := s.EndpointsOf(mesh.ServiceName("billing")); len(got) != 1 || got[0].Agent != meshtest.AgentID("billing") {
		t.Errorf("endpoints = %+v", got)
	}
}

func TestNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n meshtest.Network
		if _, err := n.DialContext(t.Context(), "tcp", "10.0.0.1:80"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial without a listener = %v, want ECONNREFUSED", err)
		}
		l, err := n.Listen("10.0.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Listen("10.0.0.1:80"); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("listen twice = %v, want EADDRINUSE", err)
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Errorf("read request: %v", err)
			}
			w.Write(body)
		})}
		done := make(chan error, 1)
		go func() { done <- server.Serve(l) }()
		transport := &http.Transport{DialContext: n.DialContext}
		body := strings.Repeat("x", 1<<20)
		resp, err := (&http.Client{Transport: transport}).Post("http://10.0.0.1:80/", "text/plain", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		if string(got) != body || err != nil {
			t.Errorf("%d bytes came back of %d, %v", len(got), len(body), err)
		}
		transport.CloseIdleConnections()
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve = %v", err)
		}
		if _, err := n.DialContext(t.Context(), "tcp", "10.0.0.1:80"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial after Close = %v, want ECONNREFUSED", err)
		}
	})
}

func TestListenerClosesWhatWasNotAccepted(t *testing.T) {
	var n meshtest.Network
	l, err := n.Listen("10.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := n.DialContext(context.Background(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("Read = %v, want EOF", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept = %v, want net.ErrClosed", err)
	}
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Close = %v, want net.ErrClosed", err)
	}
}

func TestConnHalves(t *testing.T) {
	a, b := meshtest.Pipe()
	if _, err := a.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(b); string(got) != "question" || err != nil {
		t.Errorf("b read %q, %v", got, err)
	}
	if _, err := a.Write([]byte("more")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write after CloseWrite = %v, want EPIPE", err)
	}
	if _, err := b.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	b.Close()
	if got, err := io.ReadAll(a); string(got) != "answer" || err != nil {
		t.Errorf("a read %q, %v", got, err)
	}
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read of a closed end = %v, want net.ErrClosed", err)
	}
}

func TestConnDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := meshtest.Pipe()
		defer a.Close()
		defer b.Close()
		began, one := time.Now(), make([]byte, 1)
		a.SetReadDeadline(began.Add(time.Second))
		a.SetReadDeadline(began.Add(time.Minute))
		if _, err := a.Read(one); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != time.Minute {
			t.Errorf("Read = %v after %v, want a deadline after 1m", err, time.Since(began))
		}
		var timeout net.Error
		if _, err := a.Read(one); !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("Read past the deadline = %v, want a timeout", err)
		}
		a.SetDeadline(time.Time{})
		go b.Write([]byte("x"))
		if _, err := a.Read(one); err != nil {
			t.Errorf("Read without a deadline = %v", err)
		}
		// A peer that does not read makes a writer wait.
		began = time.Now()
		a.SetWriteDeadline(began.Add(time.Second))
		sent, err := a.Write(bytes.Repeat([]byte("x"), 1<<20))
		if !errors.Is(err, os.ErrDeadlineExceeded) || sent == 0 || sent == 1<<20 {
			t.Errorf("Write = %d, %v, want a part and a deadline", sent, err)
		}
		a.SetWriteDeadline(began)
		if _, err := a.Write(one); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Write with a deadline in the past = %v", err)
		}
	})
}
