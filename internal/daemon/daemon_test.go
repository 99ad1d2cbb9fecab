package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

type testConfig struct {
	TrustDomain spiffeid.TrustDomain `yaml:"trust_domain"`
	Listen      struct {
		Address string        `yaml:"address"`
		Timeout time.Duration `yaml:"timeout"`
	} `yaml:"listen"`
	Workers int      `yaml:"workers"`
	Small   uint8    `yaml:"small"`
	Debug   bool     `yaml:"debug"`
	Peers   []string `yaml:"peers"`
	Secret  string   `yaml:"passphrase" secret:"true"`
	Key     int      `yaml:"key" secret:"true"`
	Nodes   []struct {
		Name string `yaml:"name"`
	} `yaml:"nodes"`
}

func (c *testConfig) Validate() error {
	if c.Workers < 0 {
		return fmt.Errorf("workers: %d is negative", c.Workers)
	}
	return nil
}

func writeTemp(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfigFileThenEnvironmentThenFlags(t *testing.T) {
	file := writeTemp(t, "trust_domain: corp.example\nlisten:\n  address: 127.0.0.1:1\n  timeout: 5s\nworkers: 1\nsmall: 1\n")
	var c testConfig
	err := LoadConfig(file, []string{
		"SALLYPORT_WORKERS=2", "SALLYPORT_LISTEN_TIMEOUT=7s", "SALLYPORT_PEERS=a, b,,c", "SALLYPORT_DEBUG=true", "PATH=/bin",
		"SALLYPORT_PORT=tcp://10.0.0.1:443", "SALLYPORT_SERVICE_HOST=10.0.0.1", "SALLYPORT_ISSUER_PORT_8443_TCP_ADDR=10.0.0.1",
	}, map[string]string{"workers": "3", "small": "255"}, &c)
	if err != nil {
		t.Fatal(err)
	}
	var want testConfig
	want.TrustDomain = spiffeid.RequireTrustDomainFromString("corp.example")
	want.Listen.Address, want.Listen.Timeout = "127.0.0.1:1", 7*time.Second
	want.Workers, want.Small, want.Debug, want.Peers = 3, 255, true, []string{"a", "b", "c"}
	if d := cmp.Diff(want, c, cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b })); d != "" {
		t.Error(d)
	}
}

func TestConfigRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		file  string
		env   []string
		flags map[string]string
		want  string
	}{
		"an unknown field in the file":          {file: "worker: 3\n", want: "workers"},
		"a duplicate key in the file":           {file: "workers: 3\nworkers: 4\n", want: "c.yaml:2"},
		"an unknown variable":                   {env: []string{"SALLYPORT_WORKRES=3"}, want: "SALLYPORT_WORKRES names no setting; next: unset it"},
		"an unknown flag":                       {flags: map[string]string{"wrokers": "3"}, want: "flag wrokers names no setting"},
		"a wrong number":                        {env: []string{"SALLYPORT_WORKERS=three"}, want: `workers: want a whole number of 64 bits, not "three"`},
		"a number that does not fit":            {env: []string{"SALLYPORT_SMALL=256"}, want: "want a whole number from 0 to 255"},
		"a wrong duration":                      {env: []string{"SALLYPORT_LISTEN_TIMEOUT=5"}, want: "want a duration such as 30s"},
		"a wrong trust domain":                  {env: []string{"SALLYPORT_TRUST_DOMAIN=A B"}, want: "want a valid trustdomain"},
		"a boolean that is neither":             {env: []string{"SALLYPORT_DEBUG=yes"}, want: "want true or false"},
		"a list of structs in a variable":       {env: []string{"SALLYPORT_NODES=a"}, want: "names no setting"},
		"a verdict of Validate after all is in": {flags: map[string]string{"workers": "-1"}, want: "workers: -1 is negative"},
	} {
		t.Run(name, func(t *testing.T) {
			file := ""
			if tc.file != "" {
				file = writeTemp(t, tc.file)
			}
			err := LoadConfig(file, tc.env, tc.flags, new(testConfig))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
			if Code(err) != Usage {
				t.Errorf("exit code %d, want %d", Code(err), Usage)
			}
		})
	}
}

func TestConfigReportsEveryMistake(t *testing.T) {
	err := LoadConfig("", []string{"SALLYPORT_WORKERS=x", "SALLYPORT_DEBUG=x"}, map[string]string{"nope": ""}, new(testConfig))
	for _, want := range []string{"SALLYPORT_WORKERS", "SALLYPORT_DEBUG", "flag nope"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a word on %s", err, want)
		}
	}
}

func TestConfigFilesThatAreNone(t *testing.T) {
	dir := t.TempDir()
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "missing.yaml"): "no such file; next: create it",
		dir:                                "not a regular file",
		big:                                "more than the limit",
	} {
		if err := LoadConfig(path, nil, nil, new(testConfig)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want an error with %q", path, err, want)
		}
	}
}

func TestSecretsStayOutOfErrors(t *testing.T) {
	err := LoadConfig("", []string{"SALLYPORT_KEY=hunter2"}, nil, new(testConfig))
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("got %v, want an error without the value", err)
	}
}

func TestShow(t *testing.T) {
	var c testConfig
	c.TrustDomain = spiffeid.RequireTrustDomainFromString("corp.example")
	c.Listen.Address, c.Listen.Timeout = "[::1]:80", 90*time.Second
	c.Peers, c.Secret = []string{"a", "no", "x: y"}, "hunter2"
	c.Nodes = append(c.Nodes, struct {
		Name string `yaml:"name"`
	}{"n1"})
	var b bytes.Buffer
	if err := Show(&b, &c); err != nil {
		t.Fatal(err)
	}
	want := `trust_domain: corp.example
listen:
  address: "[::1]:80"
  timeout: "1m30s"
workers: 0
small: 0
debug: false
peers:
  - a
  - "no"
  - "x: y"
passphrase: "********"
key: 0
nodes:
  -
    name: n1
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Error(d)
	}
	b2 := strings.ReplaceAll(b.String(), `"********"`, "hunter2")
	var back testConfig
	if err := LoadConfig(writeTemp(t, b2), nil, nil, &back); err != nil {
		t.Fatalf("what Show prints does not load: %v", err)
	}
	if d := cmp.Diff(c, back, cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b })); d != "" {
		t.Error(d)
	}
}

func TestExitCodesAndHints(t *testing.T) {
	base := errors.New("it broke")
	err := Hint(Exit(Unreachable, Hint(base, "fix it")), "ask somebody")
	if err.Error() != "it broke; next: fix it" {
		t.Errorf("got %q: the inner hint must stay alone", err)
	}
	if Code(fmt.Errorf("run: %w", err)) != Unreachable || !errors.Is(err, base) {
		t.Error("code or cause lost")
	}
	if Code(nil) != OK || Code(base) != Failed || Exit(Usage, nil) != nil || Hint(nil, "x") != nil {
		t.Error("wrong defaults")
	}
}

func TestLoggerIsJSONInUTC(t *testing.T) {
	var b bytes.Buffer
	log, level := NewLogger(&b, "warn", false)
	log.Info("unseen")
	level.Set(slog.LevelInfo)
	log.Info("seen", "at", time.Unix(0, 0).In(time.FixedZone("x", 3600)))
	if got := b.String(); strings.Contains(got, "unseen") || !strings.Contains(got, `"at":"1970-01-01T00:00:00Z"`) {
		t.Errorf("got %s", got)
	}
	if _, err := ParseLevel("loud"); err == nil {
		t.Error("an unknown level was accepted")
	}
}

func TestReady(t *testing.T) {
	var r Ready
	if r.Err() == nil {
		t.Error("the zero value is ready")
	}
	r.Expect("svid", "policy")
	r.Set("svid", nil)
	if err := r.Err(); err == nil || err.Error() != "not ready: policy: waiting" {
		t.Errorf("got %v", err)
	}
	r.Set("policy", nil)
	if err := r.Err(); err != nil {
		t.Error(err)
	}
}

// shortDir is a directory whose sockets fit into sockaddr_un.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// startAdmin runs a and returns once it answers.
func startAdmin(t *testing.T, a *Admin) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		resp, err := AdminClient(a.Socket).Get("http://admin/livez")
		if err == nil {
			resp.Body.Close()
			return
		}
		if t.Context().Err() != nil {
			t.Fatal(err)
		}
	}
}

func TestAdmin(t *testing.T) {
	var drained atomic.Int32 // in the server's goroutine
	level := new(slog.LevelVar)
	a := &Admin{
		Socket: filepath.Join(shortDir(t), "run", "a.sock"), Ready: new(Ready), Level: level, Log: quiet(),
		Metrics:    http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "m 1\n") }),
		ConfigDump: func() any { return &testConfig{Secret: "hunter2", Workers: 4} },
		Drain:      func() { drained.Add(1) },
		Extra: map[string]http.Handler{"GET /extra": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "more")
		})},
	}
	startAdmin(t, a)
	for path, want := range map[string]os.FileMode{a.Socket: 0o600, filepath.Dir(a.Socket): 0o700} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v %v, want mode %04o", path, info.Mode(), err, want)
		}
	}
	c := AdminClient(a.Socket)
	for _, tc := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"GET", "/readyz", "", 503, "nothing has reported"},
		{"GET", "/metrics", "", 200, "m 1"},
		{"GET", "/config_dump", "", 200, `"passphrase": "********"`},
		{"GET", "/loglevel", "", 200, "info"},
		{"PUT", "/loglevel", "debug\n", 200, "debug"},
		{"PUT", "/loglevel", "loud", 400, "not one of"},
		{"PUT", "/loglevel", "", 400, "missing"},
		{"GET", "/drain", "", 405, ""},
		{"POST", "/drain", "", 202, "draining"},
		{"GET", "/extra", "", 200, "more"},
		{"GET", "/nope", "", 404, ""},
	} {
		req, _ := http.NewRequestWithContext(t.Context(), tc.method, "http://admin"+tc.path, strings.NewReader(tc.body))
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tc.code || !strings.Contains(string(body), tc.want) || strings.Contains(string(body), "hunter2") {
			t.Errorf("%s %s: %d %s, want %d %q", tc.method, tc.path, resp.StatusCode, body, tc.code, tc.want)
		}
	}
	if drained.Load() != 1 || level.Level() != slog.LevelDebug {
		t.Errorf("drained %d times, level %v", drained.Load(), level.Level())
	}
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "already running") {
		t.Errorf("a second process on the socket: got %v", err)
	}
}

func TestAdminSocketOfDeadProcessIsReplaced(t *testing.T) {
	path := filepath.Join(shortDir(t), "a.sock")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	startAdmin(t, &Admin{Socket: path, Ready: new(Ready), Log: quiet()})
}

func TestAdminRefusesPlacesThatAreNotPrivate(t *testing.T) {
	dir := shortDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		file:                          "not a socket",
		filepath.Join(open, "a.sock"): "lets others in; next: chmod",
		filepath.Join(file, "a.sock"): "not a directory",
		filepath.Join(dir, strings.Repeat("a", 120)): "allows 107",
	} {
		if _, err := ListenPrivate(path, quiet()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want an error with %q", path, err, want)
		}
	}
}

func TestOnlyOwnUserAndRootAreAllowed(t *testing.T) {
	for _, tc := range []struct {
		uid, own uint32
		want     bool
	}{{1000, 1000, true}, {0, 1000, true}, {1001, 1000, false}, {1000, 0, false}, {0, 0, true}} {
		if got := allowed(tc.uid, tc.own); got != tc.want {
			t.Errorf("uid %d at a process of %d: %v, want %v", tc.uid, tc.own, got, tc.want)
		}
	}
}

func TestAdminClientWithoutProcess(t *testing.T) {
	_, err := AdminClient(filepath.Join(t.TempDir(), "a.sock")).Get("http://admin/livez")
	if Code(err) != Unreachable || !strings.Contains(err.Error(), "next: start it") {
		t.Errorf("got %v with code %d", err, Code(err))
	}
}

func TestSignalsInTwoSteps(t *testing.T) {
	stop, now, cancel := Signals(t.Context())
	defer cancel()
	raise := func() {
		if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	raise()
	<-stop.Done()
	if now.Err() != nil {
		t.Error("the first signal ended both")
	}
	raise()
	<-now.Done()
}

func TestSignalsCancelled(t *testing.T) {
	stop, now, cancel := Signals(t.Context())
	cancel()
	<-stop.Done()
	<-now.Done()
}

func TestNotify(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Notify("READY=1"); err != nil {
		t.Error(err)
	}
	for _, name := range []string{filepath.Join(shortDir(t), "n"), fmt.Sprintf("@sallyport-test-%d", os.Getpid())} {
		ln, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("NOTIFY_SOCKET", name)
		if err := Notify("READY=1"); err != nil {
			t.Error(err)
		}
		buf := make([]byte, 64)
		n, err := ln.Read(buf)
		if err != nil || string(buf[:n]) != "READY=1" {
			t.Errorf("%s: got %q %v", name, buf[:n], err)
		}
		ln.Close()
	}
	t.Setenv("NOTIFY_SOCKET", "relative")
	if Notify("READY=1") == nil {
		t.Error("a relative NOTIFY_SOCKET was accepted")
	}
}

func TestWatchdogEvery(t *testing.T) {
	t.Setenv("WATCHDOG_PID", "")
	for text, want := range map[string]time.Duration{"": 0, "x": 0, "-1": 0, "3000000": 1500 * time.Millisecond} {
		t.Setenv("WATCHDOG_USEC", text)
		if got := WatchdogEvery(); got != want {
			t.Errorf("WATCHDOG_USEC=%q: %v, want %v", text, got, want)
		}
	}
	t.Setenv("WATCHDOG_PID", "1")
	if WatchdogEvery() != 0 {
		t.Error("took the watchdog of another process")
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	for _, text := range []string{"one", "two"} {
		if err := WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(path); string(got) != text {
			t.Errorf("got %q, want %q", got, text)
		}
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v", info.Mode())
	}
	if err := WriteFile(dir, nil, 0o600); err == nil {
		t.Error("a directory was replaced")
	}
	entries, _ := os.ReadDir(dir)
	parent, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*"))
	if len(entries) != 1 || len(parent) != 0 {
		t.Errorf("left behind: %v %v", entries, parent)
	}
	if err := WriteFile(filepath.Join(dir, "no", "f"), nil, 0o600); err == nil || strings.Count(err.Error(), "no/f") != 1 {
		t.Errorf("got %v, want the path named once", err)
	}
}

func TestWatch(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "policies")
	put := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, step := range map[string]struct{ before, change func() }{
		"a file is replaced by rename": {nil, func() { put("access.csv", "new") }},
		"a file is written in place": {nil, func() {
			must(os.WriteFile(filepath.Join(dir, "access.csv"), []byte("longer text"), 0o600))
		}},
		"a nested file changes":                    {nil, func() { put("tests/a.yaml", "new") }},
		"a directory appears with a file":          {nil, func() { put("more/b.yaml", "new") }},
		"a file is removed":                        {nil, func() { must(os.Remove(filepath.Join(dir, "access.csv"))) }},
		"the whole directory is exchanged":         {nil, func() { must(os.Rename(dir, dir+".old")); put("access.csv", "new") }},
		"the directory appears for the first time": {func() { must(os.RemoveAll(dir)) }, func() { put("access.csv", "new") }},
		"a link is moved to another tree": {func() {
			must(os.Rename(dir, dir+".1"))
			must(os.Symlink(dir+".1", dir))
		}, func() {
			must(os.Mkdir(dir+".2", 0o700))
			must(os.WriteFile(dir+".2/access.csv", []byte("new"), 0o600))
			must(os.Symlink(dir+".2", dir+".tmp"))
			must(os.Rename(dir+".tmp", dir))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			old, _ := filepath.Glob(filepath.Join(root, "*"))
			for _, p := range old {
				must(os.RemoveAll(p))
			}
			put("access.csv", "old")
			put("tests/a.yaml", "old")
			if step.before != nil {
				step.before()
			}
			ctx, cancel := context.WithCancel(t.Context())
			called := make(chan struct{}, 16)
			done := make(chan error, 1)
			go func() { done <- Watch(ctx, dir, time.Hour, func() { called <- struct{}{} }) }()
			<-called // the start
			step.change()
			<-called
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestWatchCallsNothingWhenContentStays(t *testing.T) {
	file := writeTemp(t, "same")
	ctx, cancel := context.WithCancel(t.Context())
	calls := make(chan struct{}, 16)
	done := make(chan error, 1)
	go func() { done <- Watch(ctx, file, 10*time.Millisecond, func() { calls <- struct{}{} }) }()
	<-calls
	for range 20 {
		if err := WriteFile(file, []byte("same"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := WriteFile(file, []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	<-calls
	cancel()
	<-done
	if len(calls) != 0 {
		t.Errorf("%d calls too many", len(calls))
	}
}

func TestTerminal(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if IsTerminal(f) {
		t.Error("/dev/null is no terminal")
	}
}

// TestAdminFromAnotherUser starts a client as nobody, which only root can do.
func TestAdminFromAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("not root: the rule itself is tested in TestOnlyOwnUserAndRootAreAllowed")
		return
	}
	dir := shortDir(t)
	path := filepath.Join(dir, "a.sock")
	ln, err := ListenPrivate(path, quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go ln.Accept()
	// Open the door that the modes keep shut, so that only the check remains.
	for _, p := range []string{dir, path} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	exe, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	copyOf := filepath.Join(dir, "client")
	if err := os.WriteFile(copyOf, exe, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), copyOf, "-test.run", "^TestForeignClient$")
	cmd.Env = []string{"DAEMON_TEST_SOCKET=" + path}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("PASS")) {
		t.Errorf("%v: %s", err, out)
	}
}

// TestForeignClient is the client of TestAdminFromAnotherUser.
func TestForeignClient(t *testing.T) {
	path := os.Getenv("DAEMON_TEST_SOCKET")
	if path == "" {
		return
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("got %v, want the connection closed", err)
	}
}

func TestOwnDirRefusesWhatOthersMayWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	if err := OwnDir("data_dir", dir); err != nil {
		t.Fatalf("a directory of our own: %v", err)
	}
	if err := os.Chmod(dir, 0o770); err != nil {
		t.Fatal(err)
	}
	err := OwnDir("data_dir", dir)
	if err == nil || !strings.Contains(err.Error(), "may be written by others (mode 0770); next: chmod go-w "+dir) {
		t.Errorf("a directory that the group may write: %v", err)
	}
}
