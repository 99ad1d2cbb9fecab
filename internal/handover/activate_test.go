package handover

import (
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWhatIsPassed(t *testing.T) {
	const pid = 7
	for _, tt := range []struct {
		name  string
		env   map[string]string
		n     int
		names []string
		err   string
	}{
		{"nothing", nil, 0, nil, ""},
		{"to another process", map[string]string{"LISTEN_PID": "8", "LISTEN_FDS": "x"}, 0, nil, ""},
		{"without names", map[string]string{"LISTEN_PID": "7", "LISTEN_FDS": "2"}, 2, []string{"unknown", "unknown"}, ""},
		{"with names", map[string]string{"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "listen:oidc.listen"}, 2, []string{"listen", "oidc.listen"}, ""},
		{"none", map[string]string{"LISTEN_PID": "7", "LISTEN_FDS": "0"}, 0, nil, ""},
		{"no number", map[string]string{"LISTEN_PID": "7", "LISTEN_FDS": "two"}, 0, nil, `LISTEN_FDS is "two"`},
		{"fewer than none", map[string]string{"LISTEN_PID": "7", "LISTEN_FDS": "-1"}, 0, nil, `LISTEN_FDS is "-1"`},
		{"too many", map[string]string{"LISTEN_PID": "7", "LISTEN_FDS": "129"}, 0, nil, "want a number up to 128"},
		{"names of others", map[string]string{"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b:c"}, 0, nil, "LISTEN_FDNAMES has 3 names, LISTEN_FDS says 2"},
	} {
		n, names, err := passedTo(pid, func(k string) string { return tt.env[k] })
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.err)
		}
		if n != tt.n || !slices.Equal(names, tt.names) {
			t.Errorf("%s: %d %q, want %d %q", tt.name, n, names, tt.n, tt.names)
		}
	}
}

func TestTheEnvironmentOfThePassedIsRemoved(t *testing.T) {
	for k, v := range map[string]string{"LISTEN_PID": strconv.Itoa(os.Getpid()), "LISTEN_FDS": "none", "LISTEN_FDNAMES": "a"} {
		t.Setenv(k, v)
	}
	if err := new(Doors).Activate(); err == nil || !strings.Contains(err.Error(), `sockets of the service manager: LISTEN_FDS is "none"`) {
		t.Errorf("Activate: %v", err)
	}
	for _, kv := range os.Environ() {
		if strings.HasPrefix(kv, "LISTEN_") {
			t.Errorf("still there: %s", kv)
		}
	}
}

// manager opens sockets as a service manager does, and gives a process their
// descriptors, one after another.
func manager(t *testing.T, d *Doors, sockets map[string]string) (at map[string]string) {
	t.Helper()
	at = map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(sockets)) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		ln, err := lc.Listen(t.Context(), "tcp", sockets[name])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		at[name] = ln.Addr().String()
		if err := d.adopt(descriptor(t, ln.(*net.TCPListener)), 1, []string{name}); err != nil {
			t.Fatal(err)
		}
	}
	return at
}

// descriptor is a copy of that of a socket, as it is passed: not closed on exec.
func descriptor(t *testing.T, c interface{ File() (*os.File, error) }) int {
	t.Helper()
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestADoorIsMadeOfThePassedSocketWithItsAddress(t *testing.T) {
	d := new(Doors)
	at := manager(t, d, map[string]string{"any.socket": "127.0.0.1:0", "b.listen": "127.0.0.1:0", "c.listen": "[::1]:0"})
	for setting, name := range map[string]string{"a.listen": "any.socket", "b.listen": "b.listen", "c.listen": "c.listen"} {
		ln, err := d.TCP(setting, at[name]) // the manager still has it: a new one would fail
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		go answerAll(ln, setting)
		c, err := net.Dial("tcp", at[name])
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, len(setting))
		if _, err := c.Read(b); err != nil || string(b) != setting {
			t.Errorf("%s answers %q, %v", setting, b, err)
		}
		c.Close()
	}
	if err := d.Unclaimed(); err != nil {
		t.Errorf("all are claimed: %v", err)
	}
	if ln, err := d.TCP("d.listen", "127.0.0.1:0"); err != nil {
		t.Errorf("a setting without a passed socket opens its own: %v", err)
	} else {
		ln.Close()
	}
}

func TestAPassedSocketAtAnotherAddressIsRefused(t *testing.T) {
	d := new(Doors)
	at := manager(t, d, map[string]string{"b.listen": "127.0.0.1:0"})
	if ln, err := d.TCP("b.listen", "127.0.0.1:0"); err == nil || !strings.Contains(err.Error(), `socket "b.listen" at `+at["b.listen"]+` is not at 127.0.0.1:0, as the configuration says`) {
		t.Errorf("%v, %v", ln, err)
	}
	if err := d.Unclaimed(); err == nil || !strings.Contains(err.Error(), `socket "b.listen" at `+at["b.listen"]+`, and no setting has this address; next: `) {
		t.Errorf("Unclaimed: %v", err)
	}
}

func TestOnlyWhatListensForTCPMayBePassed(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	local, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	file, err := unix.Dup(int(null.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	for what, fd := range map[string]int{
		"does not listen":  descriptor(t, c.(*net.TCPConn)),
		"is no TCP socket": descriptor(t, local.(*net.UnixListener)), "is no socket": file,
	} {
		err := new(Doors).adopt(fd, 1, []string{"x"})
		if err == nil || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), "Accept=no") {
			t.Errorf("%s: %v", what, err)
		}
		unix.Close(fd)
	}
}

func TestAddressesOfPassedSockets(t *testing.T) {
	for _, tt := range []struct {
		has, want string
		same      bool
	}{
		{"[::]:80", ":80", true},
		{"[::]:80", "[::]:80", true},
		{"0.0.0.0:80", "0.0.0.0:80", true},
		{"[::]:80", "0.0.0.0:80", false},
		{"0.0.0.0:80", ":80", false},
		{"127.0.0.1:80", "localhost:80", true},
		{"127.0.0.1:80", "127.0.0.1:81", false},
		{"127.0.0.1:80", "127.0.0.2:80", false},
		{"[fe80::1%lo]:80", "[fe80::1%lo]:80", true},
		{"[fe80::1%lo]:80", "[fe80::1%eth0]:80", false},
	} {
		has, err := net.ResolveTCPAddr("tcp", tt.has)
		if err != nil {
			t.Fatal(err)
		}
		want, err := net.ResolveTCPAddr("tcp", tt.want)
		if err != nil {
			t.Fatal(err)
		}
		if got := sameTCP(has, want); got != tt.same {
			t.Errorf("%s listens, %s is written: %v", tt.has, tt.want, got)
		}
	}
}

// A process that takes over and was started by the service manager has each
// socket twice.
func TestTheSocketOfTheProcessBeforeGoesFirst(t *testing.T) {
	d := new(Doors)
	at := manager(t, d, map[string]string{"listen": "127.0.0.1:0"})["listen"]
	before := d.passed[0]
	own, err := unix.Dup(int(before.file.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	d.from = map[name]*os.File{{"listen", at}: os.NewFile(uintptr(own), "listen")}
	ln, err := d.TCP("listen", at)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if err := d.Unclaimed(); err != nil || len(d.from) > 0 {
		t.Errorf("left over: %v, %v", err, d.from)
	}
	if _, err := before.file.Stat(); err == nil {
		t.Error("the other copy is still open")
	}
}
