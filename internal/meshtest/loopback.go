package meshtest

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// Loopback writes cert.pem and key.pem into dir: a certificate for 127.0.0.1,
// for servers and clients, which is its own authority. Programs outside of the
// mesh stand on it.
func Loopback(t testing.TB, dir string) {
	t.Helper()
	key := NewKey(t)
	tpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "127.0.0.1"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, tpl, tpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: cert}, "key.pem": {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// ports are tried once each, below the range from which the kernel takes those that
// are not asked for by number (ip-sysctl: ip_local_port_range).
var ports atomic.Uint32

// Listen listens at an address of loopback, or at a new one if addr is empty. Nothing
// else takes that by chance: it may be closed and listened at again.
func Listen(t testing.TB, addr string) net.Listener {
	t.Helper()
	for range 1000 {
		at := addr
		if at == "" {
			at = fmt.Sprintf("127.0.0.1:%d", 20000+(uint32(os.Getpid())*61+ports.Add(1))%12000)
		}
		ln, err := net.Listen("tcp", at)
		if err == nil {
			return ln
		}
		if addr != "" {
			t.Fatal(err)
		}
	}
	t.Fatal("no port is free from 20000 to 32000")
	return nil
}

// TCP makes two ends of a connection over loopback.
func TCP(t testing.TB) (near, far net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if near, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if far, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		near.Close()
		far.Close()
	})
	return near, far
}
