package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/capture"
	"sallyport/internal/meshtest"
)

const (
	workloadUID = 1001
	strangerUID = 1002
	sidecarUID  = 1337
)

var testDoors = Doors{Outbound: 15001, Inbound: 15006, App: 8080}

func byUser() Config {
	return Config{Users: []string{fmt.Sprint(workloadUID)}, SidecarUser: fmt.Sprint(sidecarUID)}.WithDefaults()
}

func everyone() Config {
	return Config{Everyone: true, SidecarUser: "0"}.WithDefaults() // which has the door of these tests
}

func install(t *testing.T, c Config) *Hold {
	t.Helper()
	r, err := New(c, testDoors)
	if err != nil {
		t.Fatal(err)
	}
	h, err := r.Install()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

func nft(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), meshtest.Need(t, "nft"), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// TestRulesMeanWhatTheySay has nft read what we print, and compares what it
// then finds in the kernel with what our netlink messages put there.
func TestRulesMeanWhatTheySay(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	odd := byUser()
	odd.Users = append(odd.Users, "1003")
	odd.Direct = []Direct{
		{To: netip.MustParsePrefix("10.0.0.0/9"), Ports: []uint16{53, 853}, Protocol: "udp"},
		{To: netip.MustParsePrefix("192.0.2.7/32")}, {To: netip.MustParsePrefix("2001:db8::/33"), Ports: []uint16{443}}, {Ports: []uint16{22}},
	}
	odd.InboundDirect, odd.LoopbackPorts = []uint16{9090, 9091}, []uint16{5432}
	withNames := testDoors
	withNames.Names = 15053
	for _, name := range []string{"out0", "out.1"} {
		if out, err := exec.CommandContext(t.Context(), meshtest.Need(t, "ip"), "link", "add", name, "type", "veth", "peer", "name", name+"p").CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
	for name, c := range map[string]Config{"users": byUser(), "everyone": everyone(), "exceptions": odd, "users and names": byUser(), "everyone and names": everyone(), "exceptions and names": odd} {
		doors := testDoors
		if strings.HasSuffix(name, "names") {
			doors = withNames
		}
		r, err := New(c, doors)
		if err != nil {
			t.Fatal(err)
		}
		h, err := r.Install()
		if err != nil {
			t.Fatal(err)
		}
		h.Close()
		list := func() string {
			all := nft(t, "list", "table", "inet", c.Table) + nft(t, "list", "table", "netdev", c.Table)
			nft(t, "delete", "table", "inet", c.Table)
			nft(t, "delete", "table", "netdev", c.Table)
			return all
		}
		ours := list()
		file := filepath.Join(t.TempDir(), "rules")
		if err := os.WriteFile(file, []byte(r.String()+r.FramesText()), 0o600); err != nil {
			t.Fatal(err)
		}
		nft(t, "-f", file)
		theirs := list()
		ours = strings.ReplaceAll(ours, " flags owner,persist\n", "")
		if d := cmp.Diff(lines(theirs), lines(ours)); d != "" {
			t.Errorf("%s: by nft -f (-), by netlink (+):\n%s", name, d)
		}
		if strings.Count(ours, "\n") < 20 || strings.Count(ours, "hook egress") != 4 {
			t.Errorf("%s: nft lists too little:\n%s", name, ours)
		}
	}
}

// lines drops what says nothing of the rules.
func lines(s string) (out []string) {
	for l := range strings.Lines(s) {
		if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "flags") && !strings.HasPrefix(l, "#") {
			out = append(out, l)
		}
	}
	return out
}

// world puts the sidecar's door and places outside on this machine.
func world(t *testing.T, sidecar int) {
	place(t, "203.0.113.7/32", "2001:db8::7/128")
	door := func(c net.Conn) string {
		dst, ok, err := capture.OriginalDst(c)
		return fmt.Sprintf("door %s %v %v", dst, ok, err)
	}
	serveAs(t, sidecar, "127.0.0.1:15001", door)
	serveAs(t, sidecar, "[::1]:15001", door)
	serveAs(t, workloadUID, "127.0.0.1:8080", func(net.Conn) string { return "app" })
	serve(t, "127.0.0.1:5432", func(net.Conn) string { return "local" })
	for _, a := range []string{"203.0.113.7:443", "203.0.113.7:22", "[2001:db8::7]:443"} {
		serve(t, a, func(net.Conn) string { return "outside" })
	}
	serveUDP(t, "203.0.113.7:53", "outside")
	serveUDP(t, "[2001:db8::7]:53", "outside")
}

// An attempt is what somebody tries and what must come of it.
type attempt struct {
	uid     int
	try     string
	want    string
	because string
}

// check has each user make its attempts, all in one process of its own.
func check(t *testing.T, cgroup string, attempts ...attempt) {
	t.Helper()
	for _, uid := range []int{0, workloadUID, strangerUID, sidecarUID} {
		var mine []attempt
		var tries []string
		for _, a := range attempts {
			if a.uid == uid {
				mine, tries = append(mine, a), append(tries, a.try)
			}
		}
		if len(mine) == 0 {
			continue
		}
		got := strings.Split(as(t, uid, cgroup, strings.Join(tries, "\n")), "\n")
		if len(got) != len(mine)+1 {
			t.Fatalf("user %d: %d answers for %d attempts: %q", uid, len(got)-1, len(mine), got)
		}
		for i, a := range mine {
			if !strings.HasPrefix(got[i], a.want) {
				t.Errorf("%s: user %d, %s: %q, want %q", a.because, a.uid, a.try, got[i], a.want)
			}
		}
	}
}

func TestWorkloadHasOneWayOut(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	world(t, sidecarUID)
	check(t, "", attempt{workloadUID, "tcp 203.0.113.7:443", "outside", "there are no rules yet"})
	c := byUser()
	c.Direct = []Direct{{To: netip.MustParsePrefix("203.0.113.0/24"), Ports: []uint16{22}}}
	install(t, c)
	check(t, "",
		attempt{workloadUID, "tcp 203.0.113.7:443", "door 203.0.113.7:443 true", "IPv4"},
		attempt{workloadUID, "tcp [2001:db8::7]:443", "door [2001:db8::7]:443 true", "IPv6"},
		attempt{workloadUID, "tcp 247.1.2.3:80", "door 247.1.2.3:80 true", "a virtual address"},
		attempt{workloadUID, "tcp [fd00:e::9]:80", "door [fd00:e::9]:80 true", "a virtual IPv6 address"},
		attempt{workloadUID, "tcp 203.0.113.7:22", "outside", "an exception"},
		attempt{workloadUID, "tcp 127.0.0.1:15001", "door 127.0.0.1:15001 false", "the door itself"},
		attempt{workloadUID, "tcp 127.0.0.1:8080", "app", "the workload may speak to itself"},
		attempt{workloadUID, "mptcp 203.0.113.7:443", "door 203.0.113.7:443 true", "MPTCP is TCP on the wire"},
		attempt{workloadUID, "bound 203.0.113.7 203.0.113.7:443", "door 203.0.113.7:443 true", "a source of its own choice"},
		attempt{workloadUID, "udp 203.0.113.7:53", "refused", "UDP"},
		attempt{workloadUID, "udp [2001:db8::7]:53", "refused", "UDP over IPv6"},
		attempt{workloadUID, "icmp 203.0.113.7", "refused", "ICMP by a raw socket"},
		attempt{strangerUID, "tcp 203.0.113.7:443", "outside", "another user is not captured"},
		attempt{strangerUID, "udp 203.0.113.7:53", "outside", "another user's UDP"},
		attempt{strangerUID, "tcp 127.0.0.1:8080", "refused", "the application answers the sidecar and itself"},
		attempt{strangerUID, "tcp 127.0.0.1:5432", "local", "other programs of the machine go on"},
		attempt{sidecarUID, "tcp 203.0.113.7:443", "outside", "the sidecar's own connections do not come back to it"},
		attempt{sidecarUID, "tcp 127.0.0.1:8080", "app", "the sidecar reaches the application"},
	)
	s, err := Look(c)
	if err != nil {
		t.Fatal(err)
	}
	if s.RefusedOther < 3 || s.RefusedTCP < 1 || len(s.Routes) != 2 {
		t.Errorf("state %+v: what was refused is not counted, or a route is missing", s)
	}
}

// TestNamesAreAsked has what a workload asks any DNS server arrive at the door for
// names, and nobody else speak or listen there.
func TestNamesAreAsked(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	world(t, sidecarUID)
	serveUDPAs(t, sidecarUID, "127.0.0.1:15053", "names")
	serveUDPAs(t, sidecarUID, "[::1]:15053", "names")
	serveAs(t, sidecarUID, "127.0.0.1:15053", func(net.Conn) string { return "names by TCP" })
	c := byUser()
	c.LoopbackPorts = []uint16{8080}
	c.Direct = []Direct{{To: netip.MustParsePrefix("203.0.113.7/32"), Ports: []uint16{53}, Protocol: "udp"}}
	doors := testDoors
	doors.Names = 15053
	r, err := New(c, doors)
	if err != nil {
		t.Fatal(err)
	}
	check(t, "", attempt{sidecarUID, "brief udp 247.255.255.255:53", "refused", "the rules are not in force"})
	h, err := r.Install()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	check(t, "",
		attempt{workloadUID, "udp 247.9.9.9:53", "names", "a server anywhere"},
		attempt{workloadUID, "udp [2001:db8::7]:53", "names", "over IPv6"},
		attempt{workloadUID, "udp 127.0.0.53:53", "names", "one on loopback, which would ask others"},
		attempt{workloadUID, "udp [::1]:53", "names", "the same over IPv6"},
		attempt{workloadUID, "udp 127.0.0.1:15053", "names", "the door itself"},
		attempt{workloadUID, "tcp 247.9.9.9:53", "names by TCP", "over TCP"},
		attempt{workloadUID, "tcp 127.0.0.53:53", "names by TCP", "over TCP on loopback"},
		attempt{workloadUID, "udp 203.0.113.7:53", "outside", "an exception"},
		attempt{workloadUID, "udp 203.0.113.7:5353", "refused", "another port"},
		attempt{workloadUID, "udp 127.0.0.1:123", "refused", "another one on loopback"},
		attempt{sidecarUID, "udp 247.255.255.255:53", "names", "the sidecar sees that the rules are in force"},
		attempt{sidecarUID, "udp 203.0.113.7:53", "outside", "what the sidecar asks goes out"},
		attempt{strangerUID, "udp 203.0.113.7:53", "outside", "what another user asks goes out"},
		attempt{strangerUID, "udp 127.0.0.1:15053", "refused", "nobody else asks in the workload's name"},
		attempt{strangerUID, "tcp 127.0.0.1:15053", "refused", "nor over TCP"},
		attempt{strangerUID, "udp 247.255.255.255:53", "refused", "nor by the address that stands for the rules"},
	)
}

// TestNobodyElseAnswers has a stranger listen at the door for names while the
// sidecar is gone.
func TestNobodyElseAnswers(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	world(t, sidecarUID)
	serveUDPAs(t, strangerUID, "127.0.0.1:15053", "lies")
	doors := testDoors
	doors.Names = 15053
	r, err := New(byUser(), doors)
	if err != nil {
		t.Fatal(err)
	}
	h, err := r.Install()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	check(t, "", attempt{workloadUID, "brief udp 247.9.9.9:53", "refused", "the stranger's answer does not leave it"})
}

func TestEveryoneIsHeld(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	world(t, 0)
	c := everyone()
	c.LoopbackPorts = []uint16{8080}
	install(t, c)
	check(t, "",
		attempt{workloadUID, "tcp 203.0.113.7:443", "door 203.0.113.7:443 true", "a workload"},
		attempt{strangerUID, "tcp [2001:db8::7]:443", "door [2001:db8::7]:443 true", "any other user"},
		attempt{strangerUID, "mptcp 203.0.113.7:443", "door 203.0.113.7:443 true", "MPTCP"},
		attempt{strangerUID, "udp 203.0.113.7:53", "refused", "UDP"},
		attempt{strangerUID, "icmp 203.0.113.7", "refused", "ICMP"},
		attempt{workloadUID, "tcp 127.0.0.1:8080", "app", "a port of loopback that is named"},
		attempt{workloadUID, "tcp 127.0.0.1:5432", "refused", "one that is not"},
		attempt{0, "udp 203.0.113.7:53", "outside", "the sidecar"},
		attempt{0, "tcp 127.0.0.1:5432", "local", "the sidecar on loopback"},
	)
}

func TestCgroupsAreHeld(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	world(t, sidecarUID)
	root, path := newCgroups(t, "app", "app/worker", "sidecar")
	c := Config{Cgroups: []string{path + "/app"}, SidecarCgroup: path + "/sidecar", SidecarUser: fmt.Sprint(sidecarUID)}.WithDefaults()
	h := install(t, c)
	check(t, root+"/app",
		attempt{workloadUID, "tcp 203.0.113.7:443", "door 203.0.113.7:443 true", "in the cgroup"},
		attempt{0, "tcp [2001:db8::7]:443", "door [2001:db8::7]:443 true", "root in the cgroup"},
		attempt{sidecarUID, "tcp 203.0.113.7:443", "door 203.0.113.7:443 true", "the sidecar's user alone is no way past"},
		attempt{workloadUID, "udp 203.0.113.7:53", "refused", "UDP"},
		attempt{workloadUID, "mptcp 203.0.113.7:443", "door 203.0.113.7:443 true", "MPTCP"},
	)
	check(t, root+"/app/worker", attempt{workloadUID, "tcp 203.0.113.7:443", "door 203.0.113.7:443 true", "below the cgroup"})
	check(t, root+"/sidecar",
		attempt{sidecarUID, "tcp 203.0.113.7:443", "outside", "the sidecar"},
		attempt{sidecarUID, "tcp 127.0.0.1:8080", "app", "the sidecar to the application"},
		attempt{workloadUID, "tcp 127.0.0.1:8080", "refused", "another user in the sidecar's cgroup"},
	)
	check(t, "", attempt{workloadUID, "tcp 203.0.113.7:443", "outside", "outside of the cgroup nobody is captured"})
	// A unit that is started again has another cgroup of the same name.
	for _, sub := range []string{"app/worker", "app"} {
		if err := os.Remove(filepath.Join(root, sub)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(root, "app"), 0o755); err != nil {
		t.Fatal(err)
	}
	again := mustRules(t, c)
	if again.Digest() == h.Digest() {
		t.Error("a cgroup that was made anew is taken for the one before")
	}
	if err := h.Replace(again); err != nil {
		t.Fatal(err)
	}
	check(t, root+"/app", attempt{workloadUID, "tcp 203.0.113.7:443", "door", "in the cgroup that was made anew"})
	c.Cgroups = []string{path}
	if _, err := New(c, testDoors); err == nil || !strings.Contains(err.Error(), "the sidecar's cgroup is within it") {
		t.Errorf("a sidecar within the captured cgroup: %v", err)
	}
	c.Cgroups = []string{"/no/such"}
	if _, err := New(c, testDoors); err == nil || !strings.Contains(err.Error(), "capture.cgroups[0]: no cgroup /no/such") {
		t.Errorf("a cgroup that is not there: %v", err)
	}
}

// TestCgroupsAreReachedThroughTheSidecar dials from another machine what processes
// of a captured cgroup listen at.
func TestCgroupsAreReachedThroughTheSidecar(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	other := newPeer(t, meshtest.Need(t, "ip"))
	root, path := newCgroups(t, "app", "app/worker", "sidecar")
	says := func(what string) func(net.Conn) string { return func(net.Conn) string { return what } }
	within := func(sub string, open func()) {
		defer enter(t, filepath.Join(root, sub))()
		open()
	}
	within("sidecar", func() {
		serveAs(t, sidecarUID, "0.0.0.0:15006", func(c net.Conn) string {
			dst, ok, err := capture.OriginalDst(c)
			return fmt.Sprintf("inbound %s %v %v", dst, ok, err)
		})
	})
	within("app", func() {
		serveAs(t, workloadUID, "0.0.0.0:8080", says("app"))
		serveAs(t, workloadUID, "0.0.0.0:7070", says("metrics"))
		serve(t, "0.0.0.0:9090", says("health"))
		serveUDPAs(t, workloadUID, "0.0.0.0:5353", "udp")
	})
	within("app/worker", func() {
		serveAs(t, workloadUID, "0.0.0.0:7071", says("debug"))
		serveUDP(t, "0.0.0.0:5354", "udp")
	})
	serveAs(t, workloadUID, "0.0.0.0:22", says("another")) // of the same user, elsewhere
	serveUDPAs(t, workloadUID, "0.0.0.0:5355", "another")
	unheld := []attempt{{try: "tcp 10.77.0.1:7070", want: "metrics"}, {try: "tcp 10.77.0.1:7071", want: "debug"}, {try: "udp 10.77.0.1:5353", want: "udp"}, {try: "udp 10.77.0.1:5354", want: "udp"}}
	for _, a := range unheld {
		other(a.try, a.want)
	}
	install(t, Config{
		Cgroups: []string{path + "/app"}, SidecarCgroup: path + "/sidecar", SidecarUser: fmt.Sprint(sidecarUID), InboundDirect: []uint16{9090},
	}.WithDefaults())
	for _, a := range unheld {
		other(a.try, "refused")
	}
	other("10.77.0.1:8080", "inbound 10.77.0.1:8080 true")
	other("10.77.0.1:15006", "inbound 10.77.0.1:15006 false")
	other("10.77.0.1:9090", "health")
	other("10.77.0.1:22", "another")
	other("udp 10.77.0.1:5355", "another")
	check(t, root+"/sidecar", attempt{sidecarUID, "tcp 127.0.0.1:8080", "app", "the sidecar reaches the application"})
	check(t, "", attempt{strangerUID, "tcp 127.0.0.1:8080", "refused", "a stranger on this machine does not"})
}

// newCgroups makes a cgroup with others below it. It gives its folder and its path.
func newCgroups(t *testing.T, below ...string) (root, path string) {
	t.Helper()
	for _, dir := range unified {
		if err := os.Mkdir(filepath.Join(dir, fmt.Sprintf("sallyport-test-%d", os.Getpid())), 0o755); err == nil {
			root = filepath.Join(dir, fmt.Sprintf("sallyport-test-%d", os.Getpid()))
		}
	}
	if root == "" {
		meshtest.Unable(t, "no cgroup can be made here")
	}
	t.Cleanup(func() { os.Remove(root) })
	for _, sub := range below {
		if err := os.Mkdir(filepath.Join(root, sub), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(filepath.Join(root, sub)) })
	}
	return root, "/" + filepath.Base(root)
}

// enter moves this process to a cgroup, where what it opens belongs to, and
// returns what moves it back.
func enter(t *testing.T, dir string) (leave func()) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	was := ""
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			was = p
		}
	}
	move := func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
	}
	move(dir)
	return func() {
		for _, base := range unified {
			if strings.HasPrefix(dir, base+"/sallyport-test-") {
				move(filepath.Join(base, was))
			}
		}
	}
}

func TestInboundIsBroughtToTheSidecar(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	ip := meshtest.Need(t, "ip")
	other := newPeer(t, ip)
	reply := func(c net.Conn) string {
		dst, ok, err := capture.OriginalDst(c)
		return fmt.Sprintf("inbound %s %v %v", dst, ok, err)
	}
	serveAs(t, sidecarUID, "0.0.0.0:15006", reply)
	serveAs(t, workloadUID, "0.0.0.0:8080", func(net.Conn) string { return "app" })
	serve(t, "0.0.0.0:9090", func(net.Conn) string { return "health" })
	serveUDP(t, "0.0.0.0:8080", "udp")
	serveUDP(t, "0.0.0.0:5353", "udp")
	serve(t, "0.0.0.0:22", func(net.Conn) string { return "another" })
	c := byUser()
	c.InboundDirect = []uint16{9090}
	h := install(t, c)
	other("10.77.0.1:8080", "inbound 10.77.0.1:8080 true")
	other("10.77.0.1:15006", "inbound 10.77.0.1:15006 false")
	other("10.77.0.1:22", "another")
	other("udp 10.77.0.1:8080", "refused")
	nft(t, "add", "table", "ip", "theirs")
	nft(t, "add", "chain", "ip", "theirs", "pre", "{ type nat hook prerouting priority -150; }")
	nft(t, "add", "rule", "ip", "theirs", "pre", "tcp dport 8081 redirect to :8080")
	other("10.77.0.1:8081", "refused: dial") // by an address translation of somebody else's
	other("udp 10.77.0.1:5353", "udp")
	everybody := everyone()
	everybody.SidecarUser = fmt.Sprint(sidecarUID)
	everybody.InboundDirect = []uint16{9090}
	r, err := New(everybody, testDoors)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Replace(r); err != nil {
		t.Fatal(err)
	}
	other("10.77.0.1:22", "inbound 10.77.0.1:22 true")
	other("10.77.0.1:9090", "health")
	other("udp 10.77.0.1:5353", "refused")
}

// TestNobodyIsReachedByACookie has the kernel answer for the workload by a SYN
// cookie: what comes of it would belong to nobody when its socket is closed.
func TestNobodyIsReachedByACookie(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	other := newPeer(t, meshtest.Need(t, "ip"))
	overfull(t, workloadUID, 9999)
	other("brief tcp 10.77.0.1:9999", "refused: read") // there are no rules yet
	h := install(t, byUser())
	other("brief tcp 10.77.0.1:9999", "refused: dial")
	everybody := everyone()
	for _, d := range []Doors{testDoors, {Outbound: 15001}} {
		r, err := New(everybody, d)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Replace(r); err != nil {
			t.Fatal(err)
		}
		other("brief tcp 10.77.0.1:9999", "refused: dial")
	}
	everybody.InboundDirect = []uint16{9999} // the guard alone
	if err := h.Replace(mustRules(t, everybody)); err != nil {
		t.Fatal(err)
	}
	other("brief tcp 10.77.0.1:9999", "refused: dial")
}

// TestNobodyElseStandsAtTheDoor has another user listen where the sidecar and
// the application do while they are gone.
func TestNobodyElseStandsAtTheDoor(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	place(t, "203.0.113.7/32")
	install(t, byUser())
	check(t, "", attempt{workloadUID, "tcp 203.0.113.7:443", "refused: dial tcp 203.0.113.7:443: connect: connection refused", "nobody is there, and that is said at once"})
	thief := func(c net.Conn) string {
		t.Errorf("a thief at %s is spoken to", c.LocalAddr())
		return "thief"
	}
	serveAs(t, strangerUID, "127.0.0.1:15001", thief)
	serveAs(t, strangerUID, "127.0.0.1:8080", thief)
	check(t, "",
		attempt{workloadUID, "brief tcp 203.0.113.7:443", "refused: dial", "a thief at the door"},
		attempt{workloadUID, "brief tcp 127.0.0.1:15001", "refused: dial", "asked by its address"},
		attempt{sidecarUID, "brief tcp 127.0.0.1:8080", "refused: dial", "a thief in the application's place"},
	)
}

// newPeer makes a second network namespace, joined by a cable, and returns
// what dials from there: an address, or a whole attempt.
func newPeer(t *testing.T, ip string) func(addr, want string) {
	t.Helper()
	holder := exec.CommandContext(t.Context(), "unshare", "-n", "sh", "-c", "ip link set lo up; echo up; exec cat")
	in, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = holder.Wait() })
	if _, err := out.Read(make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	pid := fmt.Sprint(holder.Process.Pid)
	for _, args := range [][]string{
		{ip, "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", pid}, {ip, "addr", "add", "10.77.0.1/24", "dev", "near"}, {ip, "link", "set", "near", "up"},
		{"nsenter", "-n", "-t", pid, ip, "addr", "add", "10.77.0.2/24", "dev", "far"}, {"nsenter", "-n", "-t", pid, ip, "link", "set", "far", "up"},
	} {
		if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v %s", args, err, out)
		}
	}
	return func(addr, want string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "nsenter", "-n", "-t", pid, "/proc/self/exe")
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Args[len(cmd.Args)-1] = self
		if !strings.Contains(addr, " ") {
			addr = "tcp " + addr
		}
		cmd.Env = []string{envTry + "=" + addr, "GORACE=atexit_sleep_ms=0"}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.HasPrefix(string(out), want) {
			t.Errorf("from another machine to %s: %q %v, want %q", addr, out, err, want)
		}
	}
}

func TestRulesOutliveTheirHolder(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	world(t, sidecarUID)
	c := byUser()
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	start := func() (*exec.Cmd, bool) {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
		cmd.Env = []string{envHold + "=" + string(text)}
		if _, err := cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 256)
		n, _ := out.Read(b)
		owned := strings.HasPrefix(string(b[:n]), "owned=true")
		if !owned && !strings.HasPrefix(string(b[:n]), "owned=") {
			t.Fatalf("holder: %s", b[:n])
		}
		return cmd, owned
	}
	holder, owned := start()
	if owned {
		if _, err := Remove(c); !errors.Is(err, ErrHeld) {
			t.Errorf("rules are removed while a sidecar holds them: %v", err)
		}
		if h, err := mustRules(t, c).Install(); !errors.Is(err, ErrHeld) {
			t.Errorf("a second holder: %v %v", h, err)
		}
		_ = exec.CommandContext(t.Context(), meshtest.Need(t, "nft"), "flush", "ruleset").Run()
		if s, err := Look(c); err != nil || !s.Owned || s.Digest != mustRules(t, c).Digest() {
			t.Errorf("after somebody flushed all rules: %+v %v", s, err)
		}
	} else {
		t.Log("this kernel knows no owners of tables")
	}
	_ = holder.Process.Kill()
	_ = holder.Wait()
	check(t, "", attempt{workloadUID, "udp 203.0.113.7:53", "refused", "after kill -9 of the holder"})
	if s, err := Look(c); err != nil || !s.Installed || s.Owned || !s.Stays {
		t.Errorf("after kill -9 of the holder: %+v %v", s, err)
	}
	again, owned := start()
	if s, err := Look(c); err != nil || s.Owned != owned {
		t.Errorf("a new holder owns the rules: %v, %+v %v", owned, s, err)
	}
	check(t, "", attempt{workloadUID, "tcp 203.0.113.7:443", "door", "a new holder"})
	_ = again.Process.Kill()
	_ = again.Wait()
	if removed, err := Remove(c); err != nil || !removed {
		t.Errorf("remove: %v %v", removed, err)
	}
	if out := nft(t, "list", "ruleset"); strings.TrimSpace(out) != "" {
		t.Errorf("left behind:\n%s", out)
	}
	if out, err := exec.CommandContext(t.Context(), "ip", "route", "show", "table", "local", "proto", fmt.Sprint(routeProtocol)).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("routes left behind: %s %v", out, err)
	}
	check(t, "", attempt{workloadUID, "tcp 203.0.113.7:443", "outside", "after removal"})
	if removed, err := Remove(c); err != nil || removed {
		t.Errorf("remove once more: %v %v", removed, err)
	}
}

func mustRules(t *testing.T, c Config) *Rules {
	t.Helper()
	r, err := New(c, testDoors)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestBadBatchChangesNothing has the kernel refuse a replacement: what was in
// force stays, and so it does when rules are put in twice.
func TestBadBatchChangesNothing(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	world(t, sidecarUID)
	h := install(t, byUser())
	first := nft(t, "list", "table", "inet", "sallyport")
	if err := h.Replace(mustRules(t, byUser())); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(lines(first), lines(nft(t, "list", "table", "inet", "sallyport"))); d != "" {
		t.Errorf("the same rules once more:\n%s", d)
	}
	bad := mustRules(t, everyone())
	bad.chains[len(bad.chains)-1].rules = append(bad.chains[len(bad.chains)-1].rules, rule{then: goTo("nowhere")})
	if err := h.Replace(bad); err == nil {
		t.Error("a jump to nowhere is taken")
	}
	check(t, "",
		attempt{workloadUID, "udp 203.0.113.7:53", "refused", "after a bad batch"},
		attempt{strangerUID, "tcp 203.0.113.7:443", "outside", "after a bad batch"},
	)
	// A first installation that fails leaves no route.
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Remove(byUser()); err != nil {
		t.Fatal(err)
	}
	if _, err := bad.Install(); err == nil {
		t.Error("a jump to nowhere is taken at first")
	}
	check(t, "", attempt{workloadUID, "tcp 247.1.2.3:80", "refused", "no route is left"}, attempt{workloadUID, "tcp 203.0.113.7:443", "outside", "no rule is left"})
}

func TestIsolatedNamespace(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	serve(t, "127.0.0.1:15001", func(c net.Conn) string {
		dst, ok, err := capture.OriginalDst(c)
		return fmt.Sprintf("door %s %v %v", dst, ok, err)
	})
	serve(t, "[::1]:15001", func(net.Conn) string { return "door6" })
	serve(t, "127.0.0.1:8080", func(net.Conn) string { return "app" })
	check(t, "", attempt{0, "tcp 198.51.100.1:443", "refused", "no rules, no routes"})
	serveUDP(t, "127.0.0.1:15053", "names")
	h, err := Isolated(15001, 15053).Install()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	check(t, "",
		attempt{0, "tcp 198.51.100.1:443", "door 198.51.100.1:443 true", "anywhere"},
		attempt{0, "tcp [2001:db8::1]:443", "door6", "anywhere over IPv6"},
		attempt{0, "tcp 127.0.0.1:8080", "app", "its own loopback"},
		attempt{0, "udp 198.51.100.1:53", "names", "a DNS server"},
		attempt{0, "udp 127.0.0.53:53", "names", "one on loopback"},
		attempt{0, "udp 198.51.100.1:123", "refused", "UDP"},
		attempt{0, "icmp 198.51.100.1", "refused", "ICMP"},
	)
}
