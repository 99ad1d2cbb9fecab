// Package redirect keeps the rules of the kernel that bring a workload's
// connections to its sidecar and refuse whatever else the workload sends.
//
// Rules are made from a Config, printed in the syntax of nft, and put into the
// kernel by netlink in one transaction: either all are in force, or what was
// before. They stand in a table of their own and outlive the process that made
// them, so that a workload whose sidecar is gone reaches nobody. The package
// starts no goroutine and works on Linux only.
package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os/user"
	"regexp"
	"strconv"
	"strings"
)

// Config says whose connections are captured. Each process is captured that
// one of Everyone, Users and Cgroups names; with none of them nothing is.
type Config struct {
	// Table is the name of the nftables table, one for each sidecar of a
	// machine. Default "sallyport".
	Table string `yaml:"table"`
	// Everyone in the network namespace but the sidecar: in a container or a
	// pod. On a machine of its own it would hold the machine's daemons too.
	Everyone bool `yaml:"everyone"`
	// Users are the names or numbers of users whose processes are captured.
	Users []string `yaml:"users"`
	// Cgroups are paths in the unified hierarchy, such as
	// "/system.slice/billing.service"; what is below them is captured too. A
	// cgroup that is made anew is another one: prefer a slice that stays.
	Cgroups []string `yaml:"cgroups"`
	// SidecarUser is the name or number of the user that the sidecar runs as,
	// which is let through. The workload must not be able to become that user.
	SidecarUser string `yaml:"sidecar_user"`
	// SidecarCgroup is the sidecar's cgroup. With both only a process that has
	// both is let through. One of them is required.
	SidecarCgroup string `yaml:"sidecar_cgroup"`
	// Direct is what the workload may send past the sidecar, unjudged and in
	// clear text.
	Direct []Direct `yaml:"direct"`
	// InboundDirect are TCP ports of the workload that others reach past the
	// sidecar, such as that of a health check.
	InboundDirect []uint16 `yaml:"inbound_direct"`
	// LoopbackPorts are the TCP ports on loopback that the workload may use
	// beside the sidecar's. Default: all of loopback, of every protocol.
	LoopbackPorts []uint16 `yaml:"loopback_ports"`
	// Virtual and Virtual6 are the ranges of the addresses that stand for names.
	// They are routed to loopback. Default 247.0.0.0/8 and fd00:e::/64.
	Virtual  netip.Prefix `yaml:"virtual"`
	Virtual6 netip.Prefix `yaml:"virtual6"`
}

// Direct is one exception. Of To and Ports one is required.
type Direct struct {
	To    netip.Prefix `yaml:"to"`
	Ports []uint16     `yaml:"ports"`
	// Protocol is tcp or udp. Default tcp.
	Protocol string `yaml:"protocol"`
}

// Probe is the address from which a question comes back to the door for names as
// long as the rules are in force, whoever asks it. It stands for no name.
func (c Config) Probe() netip.Addr {
	b := c.Virtual.Addr().As4()
	for i := c.Virtual.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

// Enabled says whether the configuration captures anybody.
func (c Config) Enabled() bool { return c.Everyone || len(c.Users)+len(c.Cgroups) > 0 }

var (
	defaultVirtual  = netip.MustParsePrefix("247.0.0.0/8")
	defaultVirtual6 = netip.MustParsePrefix("fd00:e::/64")
	tableName       = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_]{0,30}$`)
)

// WithDefaults fills what was left out.
func (c Config) WithDefaults() Config {
	if c.Table == "" {
		c.Table = "sallyport"
	}
	if !c.Virtual.IsValid() {
		c.Virtual = defaultVirtual
	}
	if !c.Virtual6.IsValid() {
		c.Virtual6 = defaultVirtual6
	}
	return c
}

// Validate reports every mistake, each by the name of its field.
func (c Config) Validate() error {
	var errs []error
	bad := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("capture."+field+": "+format, args...))
	}
	if c.Table != "" && !tableName.MatchString(c.Table) {
		bad("table", "%q is not a name: write up to 31 letters, digits and underscores, a letter first", c.Table)
	}
	for i, g := range append([]string{c.SidecarCgroup}, c.Cgroups...) {
		field := "sidecar_cgroup"
		if i > 0 {
			field = fmt.Sprintf("cgroups[%d]", i-1)
		}
		if (i > 0 || g != "") && !cgroupPath(g) {
			bad(field, `%q is not a path below the root of the unified hierarchy, such as "/system.slice/billing.service"`, g)
		}
	}
	if c.Everyone && len(c.Users)+len(c.Cgroups) > 0 {
		bad("everyone", "captures users and cgroups too; leave those out, or this")
	}
	if c.Enabled() && c.SidecarUser == "" && c.SidecarCgroup == "" {
		bad("sidecar_user", "missing, and sidecar_cgroup too: the sidecar's own connections would be brought back to it")
	}
	for i, d := range c.Direct {
		f := fmt.Sprintf("direct[%d]", i)
		if !d.To.IsValid() && len(d.Ports) == 0 {
			bad(f, "names neither to nor ports")
		}
		if d.To.IsValid() && d.To != d.To.Masked() {
			bad(f+".to", "%s has bits behind its prefix: write %s", d.To, d.To.Masked())
		}
		switch d.Protocol {
		case "", "tcp", "udp":
		default:
			bad(f+".protocol", "%q is neither tcp nor udp", d.Protocol)
		}
	}
	if v := c.Virtual; v.IsValid() && (!v.Addr().Is4() || v.Bits() < 8 || v.Bits() > 24 || v != v.Masked()) {
		bad("virtual", "%s is not an IPv4 prefix of 8 to 24 bits", v)
	}
	if v := c.Virtual6; v.IsValid() && (!v.Addr().Is6() || v.Addr().Is4In6() || v.Bits() < 8 || v.Bits() > 96 || v != v.Masked()) {
		bad("virtual6", "%s is not an IPv6 prefix of 8 to 96 bits", v)
	}
	return errors.Join(errs...)
}

// cgroupPath says whether p is the clean path of a cgroup that is not the root.
func cgroupPath(p string) bool {
	if len(p) < 2 || p[0] != '/' || strings.HasSuffix(p, "/") || strings.ContainsAny(p, "\"\n\x00") {
		return false
	}
	for name := range strings.SplitSeq(p[1:], "/") {
		if name == "" || name == "." || name == ".." {
			return false
		}
	}
	return true
}

// Doors are the ports of the sidecar, and that of the application.
type Doors struct {
	// Outbound takes what the workload opens, Inbound what others open to it; 0
	// for none.
	Outbound, Inbound uint16
	// Names takes what the workload asks of DNS servers, over UDP and TCP; 0 for
	// none.
	Names uint16
	// App is where the application listens on loopback, which only the sidecar
	// and the workload itself may use; 0 for none.
	App uint16
}

// userNumber reads a user's name or number.
func userNumber(name string) (uint32, error) {
	if n, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(n), nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return 0, fmt.Errorf("no user %q on this machine", name)
	}
	n, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("user %q has the number %q", name, u.Uid)
	}
	return uint32(n), nil
}
