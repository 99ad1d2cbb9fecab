package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// codeConfiguration is the check without which no other can be made.
const codeConfiguration = "SP001"

// doctorChecks is the list, in the order in which one thing needs another.
func doctorChecks() []check {
	proxies := []string{gatewayProgram, sidecarProgram}
	every := []string{issuerProgram, gatewayProgram, sidecarProgram}
	return []check{
		{codeConfiguration, "configuration", every, checkConfiguration},
		{"SP002", "versions", nil, checkVersions},
		{"SP003", "clock", nil, checkClock},
		{"SP004", "directories", every, checkDirectories},
		{"SP005", "secrets", every, checkSecrets},
		{"SP006", "process", every, checkProcess},
		{"SP007", "sockets", every, checkSockets},
		{"SP008", "ready", every, checkReady},
		{"SP009", "ports", every, checkPorts},
		{"SP010", "bundle", proxies, checkBundle},
		{"SP011", "issuer", proxies, checkIssuer},
		{"SP012", "identity", proxies, checkIdentity},
		{"SP013", "policy", []string{issuerProgram}, checkPolicy},
		{"SP014", "capture", []string{sidecarProgram}, checkCapture},
		{"SP015", "names", []string{sidecarProgram}, checkNames},
		{"SP016", "file descriptors", every, checkDescriptors},
		{"SP017", "disk", every, checkDisk},
	}
}

func checkConfiguration(_ context.Context, _ *examination, i *installed) diagnosis {
	if i.err != nil {
		return bad("mend it, and check it with: "+i.program+" run --check-config --config "+i.config, "%v", i.err)
	}
	return good("%s", i.config)
}

// buildOf says from what a program was built.
func buildOf(path string) (string, error) {
	b, err := buildinfo.ReadFile(path)
	if err != nil {
		return "", err
	}
	return daemon.DescribeBuild(b), nil
}

func checkVersions(_ context.Context, x *examination, _ *installed) diagnosis {
	const fix = "install the four programs of one release, then restart what runs"
	own, err := os.Executable()
	if err != nil {
		return skipped("%v", err)
	}
	want, err := buildOf(own)
	if err != nil {
		return skipped("%v", err)
	}
	for _, i := range x.all {
		if i.path == "" {
			continue
		}
		got, err := buildOf(i.path)
		if err != nil {
			return bad(fix, "%s: %v", i.path, err)
		}
		if got != want {
			return doubtful(fix, "%s is %s, sallyport is %s", i.path, got, want)
		}
		if pid, err := i.pid(); err == nil {
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && strings.HasSuffix(exe, " (deleted)") {
				return doubtful("restart it, or hand over: docs/lifecycle.md", "%s (pid %d) runs a program that was replaced on the disk", i.name(), pid)
			}
		}
	}
	return good("%s", want)
}

func checkClock(context.Context, *examination, *installed) diagnosis {
	const fix = "have the clock set: timedatectl set-ntp true, or run chrony"
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	switch {
	case err != nil:
		return skipped("the kernel does not say: %v", err)
	case state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0:
		return doubtful(fix, "the kernel says that nothing keeps the clock; SVIDs live for an hour and depend on it")
	}
	return good("kept, to within %s", time.Duration(t.Maxerror)*time.Microsecond)
}

func ownerOf(st fs.FileInfo) uint32 {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return s.Uid
	}
	return 0
}

func groupOf(st fs.FileInfo) uint32 {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return s.Gid
	}
	return 0
}

func checkDirectories(_ context.Context, _ *examination, i *installed) diagnosis {
	for _, d := range []struct {
		field, dir string
		allowed    fs.FileMode
	}{{"data_dir", i.DataDir, 0o700}, {"run_dir", i.RunDir, 0o700}} {
		mode, uid, err := modeOf(d.dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if d.field == "run_dir" {
				continue // SP006 says that nothing runs
			}
			return bad("start "+i.program+", which makes it, or correct "+d.field, "%s %s is not there", d.field, d.dir)
		case err != nil:
			return skipped("%v", err)
		case mode.Perm()&^d.allowed != 0:
			return bad("chmod 700 "+d.dir, "%s %s has mode %04o and lets others in", d.field, d.dir, mode.Perm())
		}
		if pid, err := i.pid(); err == nil {
			if st, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil && ownerOf(st) != uid {
				return bad(fmt.Sprintf("chown -R %d %s", ownerOf(st), d.dir), "%s %s belongs to uid %d, the process runs as uid %d", d.field, d.dir, uid, ownerOf(st))
			}
		}
	}
	return good("%s", i.DataDir)
}

func checkSecrets(_ context.Context, _ *examination, i *installed) diagnosis {
	files, err := i.secrets()
	if err != nil {
		return skipped("%v", err)
	}
	for _, f := range files {
		mode, _, err := modeOf(f)
		if err != nil {
			return skipped("%v", err)
		}
		if mode.Perm()&0o077 != 0 {
			return bad("chmod 600 "+f+"; who could read it has its secret: replace that", "%s has mode %04o and holds a secret", f, mode.Perm())
		}
	}
	return good("%s, each its owner's alone", count(len(files), "file"))
}

func checkProcess(ctx context.Context, _ *examination, i *installed) diagnosis {
	status, _, err := i.get(ctx, "/livez")
	switch {
	case errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EACCES):
		return skipped("%s lets only its owner and root in", i.adminSocket())
	case err != nil || status != http.StatusOK:
		return bad("start it: "+i.program+" run --config "+i.config, "nothing answers on %s", i.adminSocket())
	}
	pid, err := i.pid()
	if err != nil {
		return good("it answers")
	}
	return good("pid %d", pid)
}

// notRunning is the diagnosis of what only a running process can show.
func notRunning() diagnosis { return skipped("it does not run, or lets nobody ask") }

func checkSockets(_ context.Context, _ *examination, i *installed) diagnosis {
	if _, err := i.pid(); err != nil {
		return notRunning()
	}
	for _, name := range []string{"admin.sock", "api.sock"} {
		path := filepath.Join(i.RunDir, name)
		mode, _, err := modeOf(path)
		if err != nil {
			continue
		}
		if mode.Perm()&0o077 != 0 {
			return bad("chmod 600 "+path, "%s has mode %04o: others may give orders on it", path, mode.Perm())
		}
	}
	return good("%s", i.adminSocket())
}

func checkReady(ctx context.Context, _ *examination, i *installed) diagnosis {
	status, body, err := i.get(ctx, "/readyz")
	if err != nil {
		return notRunning()
	}
	if status != http.StatusOK {
		text := strings.TrimSpace(string(body))
		fix := "see its log"
		if _, next, ok := strings.Cut(text, "; next: "); ok {
			fix = firstLine(next)
		}
		return bad(fix, "%s", text)
	}
	return good("it takes work")
}

// doors are the TCP addresses on which a program listens.
func (i *installed) doors() map[string]string {
	out := map[string]string{}
	for field, a := range map[string]string{"listen": i.Listen, "inbound.listen": i.Inbound.Listen, "outbound.listen": i.Outbound.Listen, "names.listen": i.Names.Listen} {
		if a != "" {
			out[field] = a
		}
	}
	return out
}

func checkPorts(ctx context.Context, _ *examination, i *installed) diagnosis {
	_, err := i.pid()
	runs := err == nil
	for field, a := range i.doors() {
		host, port, err := net.SplitHostPort(a)
		if err != nil {
			continue // the program has taken it
		}
		if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
			host = "localhost"
		}
		d := net.Dialer{Timeout: 2 * time.Second}
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, port))
		if err == nil {
			c.Close()
		}
		switch {
		case runs && err != nil:
			return bad("see SP008: doors open once there are an identity and a policy", "%s: nothing listens on %s", field, a)
		case !runs && err == nil:
			return bad("stop what has it (ss -ltnp sport = :"+port+"), or change "+field, "%s: %s is taken by another program", field, a)
		}
	}
	if !runs {
		return good("free")
	}
	return good("%s open", count(len(i.doors()), "port"))
}

func checkCapture(ctx context.Context, _ *examination, i *installed) diagnosis {
	if !i.captures() {
		return skipped("nobody is to be captured")
	}
	out, err := exec.CommandContext(ctx, i.path, "capture", "show", "--config", i.config).CombinedOutput()
	text := strings.TrimSpace(string(out))
	switch {
	case err == nil:
		return good("table inet %s", i.Capture.Table)
	case os.Geteuid() != 0:
		return skipped("only root can see the rules")
	}
	return bad("sidecar capture install --config "+i.config, "%s", firstLine(text[strings.LastIndex("\n"+text, "\n"):]))
}

// checkNames sees whether the questions of programs arrive at the sidecar. Of a
// running one the self-test does; without that resolv.conf must name it.
func checkNames(ctx context.Context, _ *examination, i *installed) diagnosis {
	if i.Names.Listen == "" {
		return skipped("names are not answered here")
	}
	if i.Names.SelfTest != "off" {
		status, body, err := i.get(ctx, "/readyz")
		if err != nil {
			return notRunning()
		}
		if status != http.StatusOK && bytes.Contains(body, []byte("not ready: names: ")) {
			return bad("see SP008", "questions of the workload do not arrive at %s", i.Names.Listen)
		}
		return good("questions arrive")
	}
	if i.captures() {
		return good("captured questions arrive while SP014 is well")
	}
	host, _, _ := net.SplitHostPort(i.Names.Listen)
	b, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return skipped("%v", err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "nameserver" && f[1] != host {
			return doubtful("write \"nameserver "+host+"\" into /etc/resolv.conf, alone", "names.self_test is off, and /etc/resolv.conf asks %s, not %s", f[1], i.Names.Listen)
		}
	}
	return good("/etc/resolv.conf asks %s", host)
}

var descriptors = regexp.MustCompile(`(?m)^Max open files +(\d+|unlimited)`)

// checkDescriptors holds the limit of the process against the connections that
// it may take: each has two ends.
func checkDescriptors(_ context.Context, _ *examination, i *installed) diagnosis {
	pid, err := i.pid()
	if err != nil {
		return notRunning()
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		return skipped("%v", err)
	}
	m := descriptors.FindSubmatch(b)
	if m == nil || string(m[1]) == "unlimited" {
		return good("without a limit")
	}
	limit, _ := strconv.Atoi(string(m[1]))
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return skipped("%v", err)
	}
	fix := "LimitNOFILE=65536 in its unit, or ulimit -n 65536 before its start"
	if len(open)*10 >= limit*9 {
		return bad(fix, "%d of %d are open", len(open), limit)
	}
	if want := 2*i.Limits.Connections + 256; i.Limits.Connections > 0 && limit < want {
		return doubtful(fix, "the limit is %d; limits.connections of %d can need %d", limit, i.Limits.Connections, want)
	}
	return good("%d of %d are open", len(open), limit)
}

const (
	// defaultSpool is what may wait in a spool that nobody has bounded.
	defaultSpool = 1 << 30
	// leastDisk is where the next records have no place.
	leastDisk = 64 << 20
)

func checkDisk(_ context.Context, _ *examination, i *installed) diagnosis {
	var st unix.Statfs_t
	if err := unix.Statfs(i.DataDir, &st); err != nil {
		return skipped("%s: %v", i.DataDir, err)
	}
	free := int64(st.Bavail) * st.Bsize
	spool := i.Audit.Spool.MaxBytes
	if spool == 0 {
		spool = defaultSpool
	}
	const fix = "free space, give data_dir a file system of its own, or bound audit.keep and audit.spool.max_bytes"
	switch {
	case free < leastDisk || st.Files > 0 && st.Ffree < 64:
		return bad(fix+"; a call that cannot be recorded is refused", "%s has %d MB free", i.DataDir, free>>20)
	case free < spool:
		return doubtful(fix, "%s has %d MB free; the audit spool may take %d MB", i.DataDir, free>>20, spool>>20)
	}
	return good("%d MB free, of which the audit spool may take %d", free>>20, spool>>20)
}

// checkPolicy asks the issuer who acts on what.
func checkPolicy(ctx context.Context, _ *examination, i *installed) diagnosis {
	if _, err := i.pid(); err != nil {
		return notRunning()
	}
	var st mesh.IssuerStatus
	var ps []mesh.Proxy
	if err := i.manage(ctx, func(ctx context.Context, a *control.Admin) (err error) {
		if st, err = a.Status(ctx); err == nil {
			ps, err = a.Proxies(ctx)
		}
		return err
	}); err != nil {
		return skipped("%v", err)
	}
	if st.LastRefusal != "" {
		return bad("mend the files and check them: sallyport policy test "+i.Policies, "the newest edit was refused, revision %d stays in force: %s", st.PolicyRevision, firstLine(st.LastRefusal))
	}
	connected := 0
	for _, p := range ps {
		if !p.Connected {
			continue
		}
		connected++
		if p.State != mesh.Synced {
			return bad("sallyport policy status; see the log of "+p.Workload.String(), "%s is %s at revision %d of %d: %s", p.Workload, p.State, p.PolicyRevision, st.PolicyRevision, firstLine(p.Reason))
		}
	}
	return good("revision %d; each of %d connected proxies is SYNCED", st.PolicyRevision, connected)
}
