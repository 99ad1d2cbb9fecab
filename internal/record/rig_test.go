package record

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"

	"sallyport/internal/capture"
	"sallyport/internal/meshtest"
)

// selfSigned is a certificate that its holder has signed.
var selfSigned = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, leaf, leaf, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

func serverConfig() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{selfSigned()}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"x"}}
}

func clientConfig() *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{selfSigned()}, NextProtos: []string{"x"}, MinVersion: tls.VersionTLS13}
}

// pair is two ends of ours.
func pair(t testing.TB) (client, server *Conn) {
	t.Helper()
	near, far := meshtest.TCP(t)
	return pairOn(t, capture.NewDirect(near), capture.NewDirect(far))
}

func pairOn(t testing.TB, near, far net.Conn) (client, server *Conn) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		var err error
		server, err = Server(context.Background(), far, serverConfig(), nil)
		done <- err
	}()
	client, err := Client(context.Background(), near, clientConfig())
	if err := errors.Join(err, <-done); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.Close()
		server.Close()
	})
	return client, server
}

// ofSuite makes the keys of both ends anew, for a suite that crypto/tls would not
// have picked.
func ofSuite(t testing.TB, id uint16, client, server *Conn) {
	t.Helper()
	s, err := suiteOf(id)
	if err != nil {
		t.Fatal(err)
	}
	up, down := make([]byte, s.size), make([]byte, s.size)
	_, _ = rand.Read(up)
	_, _ = rand.Read(down)
	client.suite, server.suite = s, s
	for _, err := range []error{client.out.set(s, up), server.in.set(s, up), client.in.set(s, down), server.out.set(s, down)} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// withTLS is an end of ours, a server or not, against crypto/tls.
func withTLS(t testing.TB, serve bool) (*Conn, *tls.Conn) {
	t.Helper()
	near, far := meshtest.TCP(t)
	nc := capture.NewDirect(near)
	var ours *Conn
	done := make(chan error, 1)
	go func() {
		var err error
		if serve {
			ours, err = Server(context.Background(), nc, serverConfig(), nil)
		} else {
			ours, err = Client(context.Background(), nc, clientConfig())
		}
		done <- err
	}()
	theirs := tls.Server(far, serverConfig())
	if serve {
		theirs = tls.Client(far, clientConfig())
	}
	if err := errors.Join(theirs.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ours.Close()
		theirs.Close()
	})
	return ours, theirs
}

// hear reads as much as there is text, and wants that.
func hear(t testing.TB, r io.Reader, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if n, err := io.ReadFull(r, b); err != nil || string(b) != text {
		t.Fatalf("got %q, %v, want %q", b[:n], err, text)
	}
}

func say(t testing.TB, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}
