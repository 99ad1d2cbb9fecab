package meshtest

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// A Rsyslog is Debian's rsyslogd as this user, taking syslog over TLS from
// clients that show the certificate in Dir.
type Rsyslog struct {
	// Addr is where it listens. Dir has cert.pem and key.pem for both sides.
	Addr, Dir string
	// Out is the file it writes: structured data, a tab and the message, a line
	// each.
	Out string

	t   testing.TB
	cmd *exec.Cmd
}

// NewRsyslog prepares one and does not start it.
func NewRsyslog(t testing.TB) *Rsyslog {
	t.Helper()
	Need(t, "rsyslogd")
	if found, _ := filepath.Glob("/usr/lib/*/rsyslog/lmnsd_gtls.so"); len(found) == 0 {
		Missing(t, "rsyslog-gnutls")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &Rsyslog{t: t, Dir: t.TempDir(), Addr: ln.Addr().String()}
	ln.Close()
	r.Out = filepath.Join(r.Dir, "out")
	Loopback(t, r.Dir)
	_, port, err := net.SplitHostPort(r.Addr)
	if err != nil {
		t.Fatal(err)
	}
	conf := strings.NewReplacer("DIR", r.Dir, "PORT", port).Replace(`global(workDirectory="DIR" maxMessageSize="128k"
  defaultNetstreamDriver="gtls" defaultNetstreamDriverCAFile="DIR/cert.pem"
  defaultNetstreamDriverCertFile="DIR/cert.pem" defaultNetstreamDriverKeyFile="DIR/key.pem")
module(load="imtcp" streamDriver.name="gtls" streamDriver.mode="1" streamDriver.authMode="x509/certvalid")
template(name="line" type="string" string="%structured-data%\t%msg:::drop-last-lf%\n")
input(type="imtcp" address="127.0.0.1" port="PORT" ruleset="in")
ruleset(name="in") { action(type="omfile" file="DIR/out" template="line" flushOnTXEnd="on") }
`)
	if err := os.WriteFile(filepath.Join(r.Dir, "conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return r
}

// Start starts it, and does not wait until it listens.
func (r *Rsyslog) Start() {
	r.t.Helper()
	r.cmd = exec.Command("rsyslogd", "-n", "-f", filepath.Join(r.Dir, "conf"), "-i", filepath.Join(r.Dir, "pid"))
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	r.cmd.Stderr = os.Stderr
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(r.Stop)
}

// Stop ends it in order: what it has read is in Out then.
func (r *Rsyslog) Stop() {
	_ = r.cmd.Process.Signal(syscall.SIGTERM)
	_ = r.cmd.Wait()
}
