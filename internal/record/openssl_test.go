package record

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"sallyport/internal/capture"
	"sallyport/internal/meshtest"
)

// identity writes the certificate and its key where openssl finds them.
func identity(t *testing.T) (cert, key string) {
	t.Helper()
	c := selfSigned()
	der, err := x509.MarshalECPrivateKey(c.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{
		cert: {Type: "CERTIFICATE", Bytes: c.Certificate[0]}, key: {Type: "EC PRIVATE KEY", Bytes: der},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// openssl starts the program, which ends with the test.
func openssl(t *testing.T, args ...string) (in io.Writer, out *bufio.Reader) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, "openssl", args...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	})
	return stdin, bufio.NewReader(stdout)
}

// until reads lines until one is text.
func until(t *testing.T, out *bufio.Reader, text string) {
	t.Helper()
	for {
		line, err := out.ReadString('\n')
		if line == text+"\n" {
			return
		}
		if err != nil {
			t.Fatalf("%q did not come: %v", text, err)
		}
	}
}

var opensslSuites = map[uint16]string{
	tls.TLS_AES_128_GCM_SHA256: "TLS_AES_128_GCM_SHA256", tls.TLS_AES_256_GCM_SHA384: "TLS_AES_256_GCM_SHA384",
	tls.TLS_CHACHA20_POLY1305_SHA256: "TLS_CHACHA20_POLY1305_SHA256",
}

// TestOpenSSLClient has openssl call, and change its keys with and without asking
// for ours, in every suite.
func TestOpenSSLClient(t *testing.T) {
	meshtest.Need(t, "openssl")
	cert, key := identity(t)
	for id, name := range opensslSuites {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			in, out := openssl(t, "s_client", "-connect", ln.Addr().String(), "-cert", cert, "-key", key, "-ciphersuites", name, "-tls1_3")
			nc, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			c, err := Server(context.Background(), capture.NewDirect(nc), serverConfig(), nil)
			if err != nil {
				t.Fatal(err)
			}
			talk(t, c, in, out, id)
		})
	}
}

// TestOpenSSLServer calls openssl, which also sends tickets that nobody uses.
func TestOpenSSLServer(t *testing.T) {
	meshtest.Need(t, "openssl")
	cert, key := identity(t)
	for id, name := range opensslSuites {
		t.Run(name, func(t *testing.T) {
			ln := meshtest.Listen(t, "")
			addr := ln.Addr().String()
			ln.Close()
			in, out := openssl(t, "s_server", "-accept", addr, "-cert", cert, "-key", key, "-Verify", "1", "-ciphersuites", name, "-tls1_3")
			until(t, out, "ACCEPT")
			nc, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			c, err := Client(context.Background(), capture.NewDirect(nc), clientConfig())
			if err != nil {
				t.Fatal(err)
			}
			talk(t, c, in, out, id)
		})
	}
}

// talk says something both ways before and after each change of keys.
func talk(t *testing.T, c *Conn, in io.Writer, out *bufio.Reader, id uint16) {
	t.Helper()
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if got := c.State().CipherSuite; got != id {
		t.Fatalf("suite %#04x, want %#04x", got, id)
	}
	peer := bufio.NewReader(c)
	for i, order := range []string{"", "k", "K", "K", "k", ""} {
		if order != "" {
			say(t, in, order+"\n") // which must have been read before more comes
			if c.in.client {
				if err := c.Await(); err != nil {
					t.Fatal(err)
				}
			} else {
				until(t, out, "KEYUPDATE")
			}
		}
		text := fmt.Sprintf("round %d", i)
		say(t, in, text+"\n")
		until(t, peer, text)
		if i == 3 { // ours without being asked
			c.ask.Store(true)
		}
		say(t, c, text+"\n")
		until(t, out, text)
	}
	if c.in.seq > 20 || c.out.seq > 5 {
		t.Errorf("sequence numbers %d and %d: keys were not changed", c.in.seq, c.out.seq)
	}
	say(t, in, "Q\n")
	want := io.EOF
	if c.in.client {
		want = io.ErrUnexpectedEOF // its server closes the socket and says nothing
	}
	if _, err := peer.ReadString('\n'); err != want {
		t.Errorf("at the end: %v, want %v", err, want)
	}
}
