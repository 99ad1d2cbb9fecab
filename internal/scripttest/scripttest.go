// Package scripttest runs the scripts of a program (testdata/script) and has the
// commands that those of all programs share.
package scripttest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"maps"
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

// A Command is what a script may call, beside the programs.
type Command = func(ts *testscript.TestScript, neg bool, args []string)

// Run runs the scripts. Beside the commands in p they have fails, taken and root.
func Run(t *testing.T, p testscript.Params) {
	p.Dir, p.RequireExplicitExec, p.RequireUniqueNames = "testdata/script", true, true
	cmds := map[string]Command{"fails": fails, "taken": taken, "root": root}
	maps.Copy(cmds, p.Cmds)
	p.Cmds = cmds
	testscript.Run(t, p)
}

// Write writes a file of a script.
func Write(ts *testscript.TestScript, file, text string) {
	ts.Check(os.WriteFile(ts.MkAbs(file), []byte(text), 0o600))
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
	Write(ts, args[1], strings.ReplaceAll(ts.ReadFile(args[0]), "TAKEN", ln.Addr().String()))
}

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
	Write(ts, args[0], string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
}
