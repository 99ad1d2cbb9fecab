package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"gateway": main}) }

func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", RequireExplicitExec: true, RequireUniqueNames: true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"fails": fails, "taken": taken, "root": root},
	})
}

// fails runs a command that must end with a code: "fails CODE PROGRAM ARGS".
// What it says begins with the program's name, and is no panic.
func fails(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	if e := (*exec.ExitError)(nil); !errors.As(err, &e) || e.ExitCode() != want {
		ts.Fatalf("%q: %v, want exit status %d", args[1:], err, want)
	}
	said := ts.ReadFile("stderr")
	if !strings.HasPrefix(said, args[1]+": ") || strings.Contains(said, "goroutine ") || strings.Contains(said, "panic") {
		ts.Fatalf("%q does not say in a sentence why:\n%s", args[1:], said)
	}
}

// taken listens on a port and writes a configuration with its address in it:
// "taken IN OUT" replaces TAKEN.
func taken(ts *testscript.TestScript, _ bool, args []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { ln.Close() })
	text := strings.ReplaceAll(ts.ReadFile(args[0]), "TAKEN", ln.Addr().String())
	ts.Check(write(ts.MkAbs(args[1]), text))
}

func write(file, text string) error { return os.WriteFile(file, []byte(text), 0o600) }

// root writes a root certificate: "root FILE".
func root(ts *testscript.TestScript, _ bool, args []string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{{Scheme: "spiffe", Host: "demo.sallyport"}},
		NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	ts.Check(err)
	ts.Check(write(ts.MkAbs(args[0]), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))))
}
