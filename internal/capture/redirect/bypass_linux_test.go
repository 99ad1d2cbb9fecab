package redirect

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"sallyport/internal/meshtest"
)

// A kernelBypass is something that a workload sends past the sidecar. It must be
// refused or end at the sidecar's door; the row is that of the corpus.
type kernelBypass struct {
	row       int
	what, try string
}

// ofUser are tried by a workload that may open sockets of every kind.
func ofUser() []kernelBypass {
	return []kernelBypass{
		{29, "QUIC", "udp 203.0.113.7:443"}, {29, "QUIC over IPv6", "udp [2001:db8::7]:443"},
		{92, "a DNS server outside", "udp 203.0.113.7:53"}, {92, "one over IPv6", "udp [2001:db8::7]:53"},
		{93, "DNS over TCP", "tcp 203.0.113.7:53"}, {94, "DNS over TLS", "tcp 203.0.113.7:853"}, {96, "DNS over QUIC", "udp 203.0.113.7:853"},
		{97, "mDNS", "multicast 224.0.0.251"}, {97, "LLMNR", "multicast 224.0.0.252"},
		{108, "UDP", "udp 203.0.113.7:9999"}, {108, "UDP over IPv6", "udp [2001:db8::7]:9999"},
		{109, "ICMP", "icmp 203.0.113.7"}, {110, "raw IP", "raw 203.0.113.7"}, {110, "GRE", "gre 203.0.113.7"}, {110, "raw IP to a neighbour", "raw 10.77.0.2"},
		{111, "a frame", "frame near"}, {111, "a frame past the queue", "frame-direct near"},
		{117, "TCP over IPv6", "tcp [2001:db8::7]:443"}, {118, "a first fragment", "fragment 10.77.0.2"},
		{119, "a socket with a mark", "mark 203.0.113.7:443"}, {125, "MPTCP", "mptcp 203.0.113.7:443"}, {125, "TCP Fast Open", "fast 203.0.113.7:443"},
		{125, "an interface of its own choice", "brief device 10.77.0.2:443 near"}, {5, "an address of its own choice", "tcp 203.0.113.7:443"},
	}
}

// notOutside says what is wrong when an attempt has led outside.
func notOutside(said string) error {
	if strings.HasPrefix(said, "refused") || strings.HasPrefix(said, "door") || strings.HasPrefix(said, "no socket") {
		return nil
	}
	return fmt.Errorf("it says %q", said)
}

// TestBypass tries what rows of the corpus say of the kernel, first without rules,
// so that it is known that it leads outside.
func TestBypass(t *testing.T) {
	if os.Getenv(envInside) == "" && os.Getenv("BYPASS_TABLE") != "" {
		out, err := bypassesInside(t)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for line := range bytes.Lines(out) {
			if line[0] >= '0' && line[0] <= '9' || line[0] == '{' || bytes.HasPrefix(line, []byte("open: ")) {
				fmt.Printf("%s", line)
			}
		}
		return
	}
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	world(t, sidecarUID)
	newPeer(t, meshtest.Need(t, "ip"))
	for _, a := range []string{"203.0.113.7:53", "203.0.113.7:853"} {
		serve(t, a, func(net.Conn) string { return "outside" })
	}
	for _, a := range []string{"203.0.113.7:443", "203.0.113.7:853", "203.0.113.7:9999", "[2001:db8::7]:443", "[2001:db8::7]:9999"} {
		serveUDP(t, a, "outside")
	}
	if out, err := exec.CommandContext(t.Context(), "ip", "route", "add", "224.0.0.0/4", "dev", "near").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	all := ofUser()
	for i, said := range tried(t, all) {
		if b := all[i]; notOutside(said) == nil && b.row != 109 && b.row != 125 && b.row != 119 {
			t.Errorf("without rules %s leads nowhere either: %s", b.what, said)
		}
	}
	c := byUser()
	h := install(t, c)
	if !h.Owned || !h.Frames() {
		meshtest.Unable(t, "this kernel holds no rules for their owner, or no frames")
	}
	var table meshtest.Bypasses
	try := func(way string, list ...kernelBypass) {
		t.Helper()
		for i, said := range tried(t, list) {
			table.Add(t, list[i].row, list[i].what, way, notOutside(said))
		}
	}
	try("a user", all...)
	theft := kernelBypass{115, "flushing all rules", "udp 203.0.113.7:9999"}
	_ = exec.CommandContext(t.Context(), "nft", "flush", "ruleset").Run()
	try("root beside it", theft)
	for _, family := range []string{"inet", "netdev"} {
		theft.what = "deleting the table " + family
		if exec.CommandContext(t.Context(), "nft", "delete", "table", family, c.Table).Run() == nil {
			t.Errorf("the table %s was deleted by somebody else", family)
		}
		try("root beside it", theft, kernelBypass{115, theft.what + ", then a frame", "frame near"})
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	try("a user while nobody holds the rules", kernelBypass{124, "TCP", "brief tcp 203.0.113.7:443"}, kernelBypass{124, "UDP", "udp 203.0.113.7:9999"}, kernelBypass{124, "a frame", "frame near"})
	table.Print("rows 112, 113, 114, 116 are tried by TestCgroupsAreHeld and by the ways own-network, other-user and other-cgroup of leak-test")
}

// tried has the workload try them, all in one process, and returns what came.
func tried(t *testing.T, list []kernelBypass) []string {
	t.Helper()
	var tries []string
	for _, b := range list {
		tries = append(tries, b.try)
	}
	said := strings.Split(strings.TrimSuffix(as(t, workloadUID, "", strings.Join(tries, "\n")), "\n"), "\n")
	if len(said) != len(list) {
		t.Fatalf("%d answers to %d attempts: %q", len(said), len(list), said)
	}
	return said
}

// bypassesInside runs the test in a network namespace and returns what it prints.
func bypassesInside(t *testing.T) ([]byte, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestBypass$")
	cmd.Env, cmd.SysProcAttr = append(os.Environ(), envInside+"=1"), ownNamespace()
	return cmd.CombinedOutput()
}
