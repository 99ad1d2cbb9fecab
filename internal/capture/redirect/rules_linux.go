package redirect

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Rules are what a configuration means on this machine at this moment: users
// and cgroups have become numbers.
type Rules struct {
	table  string
	maps   []portMap
	chains []chain
	// frames are the chains of the table for frames.
	frames   []chain
	virtual  []netip.Prefix
	isolated bool
	// cgroups are the numbers of those that are named; one that was made anew
	// has another.
	cgroups []uint64
}

// A portMap says to which port of the sidecar a connection goes, by what the
// kernel knows of its maker.
type portMap struct {
	name, kind string
	elements   []element
}

type element struct {
	text string
	key  []byte
	port uint16
}

// A chain is a list of rules. One without a hook is jumped to.
type chain struct {
	name  string
	hook  *hook
	rules []rule
}

type hook struct {
	kind, at string
	// before the number that the kind is known by in nft, so that nobody
	// else's address translation comes first.
	priority int
	// device is whose frames it sees, of the hook "egress".
	device string
}

// A rule acts on a packet that satisfies all its terms.
type rule struct {
	when    []term
	then    term
	counted bool
	comment string
}

var (
	onOutput     = &hook{kind: "nat", at: "output", priority: -105}
	onPrerouting = &hook{kind: "nat", at: "prerouting", priority: -105}
	onLeaving    = &hook{kind: "filter", at: "output"}
	onArriving   = &hook{kind: "filter", at: "input"}
)

// subject is somebody whose packets are recognised.
type subject []term

// New makes the rules of a configuration with defaults.
func New(c Config, d Doors) (*Rules, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if !c.Enabled() {
		return nil, errors.New("capture: nobody is to be captured; name users, cgroups or everyone")
	}
	b := &builder{c: c, d: d}
	b.resolve()
	if err := errors.Join(b.errs...); err != nil {
		return nil, err
	}
	return b.rules(), nil
}

// Isolated are the rules for a network namespace in which there is nothing but
// the workload and the doors of a sidecar that stands outside. Without a port for
// names there is no door for them.
func Isolated(outbound, names uint16) *Rules {
	b := &builder{c: Config{Everyone: true}.WithDefaults(), d: Doors{Outbound: outbound, Names: names}}
	r := b.rules()
	r.isolated = true
	return r
}

// A builder turns a configuration into rules.
type builder struct {
	c       Config
	d       Doors
	sidecar subject // nil: nobody is let through
	held    []subject
	users   []subject // of held, those that are users
	devices []net.Interface
	maps    []portMap
	cgroups []uint64
	errs    []error
}

// resolve finds the numbers of users and cgroups.
func (b *builder) resolve() {
	fail := func(field string, err error) {
		if err != nil {
			b.errs = append(b.errs, fmt.Errorf("capture.%s: %w", field, err))
		}
	}
	if b.c.SidecarUser != "" {
		uid, err := userNumber(b.c.SidecarUser)
		fail("sidecar_user", err)
		b.sidecar = append(b.sidecar, skuid(uid))
	}
	if b.c.SidecarCgroup != "" {
		g, err := findCgroup(b.c.SidecarCgroup)
		fail("sidecar_cgroup", err)
		b.sidecar = append(b.sidecar, inCgroup(g))
		b.cgroups = append(b.cgroups, g.id)
	}
	users := portMap{name: "users", kind: "uid"}
	for i, name := range b.c.Users {
		uid, err := userNumber(name)
		if err == nil && len(b.sidecar) == 1 && b.sidecar[0].text == skuid(uid).text {
			err = errors.New("the sidecar is the same user: what it sends would be taken for the workload's, and the other way round")
		}
		fail(fmt.Sprintf("users[%d]", i), err)
		users.elements = append(users.elements, element{fmt.Sprint(uid), native32(uid), b.d.Outbound})
		b.held = append(b.held, subject{skuid(uid)})
	}
	b.users = slices.Clone(b.held)
	if len(users.elements) > 0 {
		b.maps = append(b.maps, users)
	}
	byLevel := map[int]*portMap{}
	for i, path := range b.c.Cgroups {
		g, err := findCgroup(path)
		fail(fmt.Sprintf("cgroups[%d]", i), err)
		if s := b.c.SidecarCgroup; err == nil && (s == path || strings.HasPrefix(s, path+"/")) {
			fail(fmt.Sprintf("cgroups[%d]", i), errors.New("the sidecar's cgroup is within it; give the workload one of its own"))
		}
		m := byLevel[g.level]
		if m == nil {
			m = &portMap{name: fmt.Sprintf("cgroups_%d", g.level), kind: "cgroupsv2"}
			byLevel[g.level] = m
		}
		m.elements = append(m.elements, element{`"` + g.path[1:] + `"`, native64(g.id), b.d.Outbound})
		b.held = append(b.held, subject{inCgroup(g)})
		b.cgroups = append(b.cgroups, g.id)
	}
	for level := range 256 {
		if m := byLevel[level]; m != nil {
			b.maps = append(b.maps, *m)
		}
	}
	var err error
	if b.devices, err = net.Interfaces(); err != nil {
		b.errs = append(b.errs, fmt.Errorf("capture: list the interfaces: %w", err))
	}
}

func (b *builder) rules() *Rules {
	r := &Rules{table: b.c.Table, maps: b.maps, virtual: virtualOf(b.c), cgroups: b.cgroups}
	r.chains = []chain{{name: "refuse", rules: refuse()}, {name: "held", rules: b.heldRules()}, {name: "guard", hook: onLeaving, rules: b.guard()}}
	if b.d.Inbound != 0 {
		r.chains = append(r.chains, chain{name: "inbound", hook: onPrerouting, rules: b.inbound()})
	}
	r.chains = append(r.chains, chain{name: "outbound", hook: onOutput, rules: b.outbound()}, chain{name: "arriving", hook: onArriving, rules: b.arriving()})
	guard := r.chains[2].rules
	guard[0].comment = "sha256:" + r.digest()
	r.frames = b.frames()
	return r
}

// refuse tells the sender at once, so that it need not wait.
func refuse() []rule {
	return []rule{
		{when: []term{l4proto(unix.IPPROTO_TCP)}, then: reset, counted: true},
		{then: prohibited, counted: true},
	}
}

// heldRules say what a workload may send; all else is refused. Only the final
// destination counts, whoever has changed it: an address translation of
// somebody else's must not be a way past the doors.
func (b *builder) heldRules() []rule {
	tcp, udp := l4proto(unix.IPPROTO_TCP), l4proto(unix.IPPROTO_UDP)
	pass := accept
	if b.c.Everyone {
		pass = both(label(passed), accept)
	}
	var rs []rule
	for _, here := range loopbacks {
		rs = append(rs, rule{when: []term{daddr(here), tcp, dport("tcp", b.d.Outbound)}, then: pass})
		for _, q := range b.questions(b.d.Names) {
			rs = append(rs, rule{when: append([]term{daddr(here)}, q...), then: pass})
		}
	}
	for _, here := range loopbacks {
		if b.c.LoopbackPorts == nil {
			rs = append(rs, rule{when: []term{daddr(here)}, then: pass})
			continue
		}
		for _, p := range b.c.LoopbackPorts {
			rs = append(rs, rule{when: []term{daddr(here), tcp, dport("tcp", p)}, then: pass})
		}
		// The answers to whoever spoke to the workload, the sidecar above all.
		rs = append(rs, rule{when: []term{daddr(here), tcp, answering}, then: pass})
	}
	for _, when := range b.direct() {
		rs = append(rs, rule{when: when, then: pass})
	}
	for _, p := range b.c.InboundDirect {
		rs = append(rs, rule{when: []term{tcp, sport(p), answering}, then: pass})
	}
	if b.sidecar == nil { // in the namespace the doors answer whatever address was bound to
		rs = append(rs, rule{when: []term{tcp, sport(b.d.Outbound), answering}, then: pass})
		if b.d.Names != 0 {
			rs = append(rs, rule{when: []term{tcp, sport(b.d.Names), answering}, then: pass}, rule{when: []term{udp, udpSport(b.d.Names), answering}, then: pass})
		}
	}
	if b.c.Everyone {
		rs = append(rs, rule{when: []term{anyOwner}, then: goTo("refuse")})
		// The rest belongs to no process: the kernel's own, or of a connection whose
		// socket is not accepted yet or closed. That may be full of what the workload
		// wrote, so that it counts only where an owner was let through before.
		rs = append(rs, rule{when: []term{l4proto(unix.IPPROTO_IGMP)}, then: accept})
		for _, typ := range neighbours {
			rs = append(rs, rule{when: []term{l4proto(unix.IPPROTO_ICMPV6), icmp6(typ)}, then: accept})
		}
		rs = append(rs, rule{when: []term{related}, then: accept}, rule{when: []term{labelled(passed)}, then: accept})
	}
	return append(rs, rule{then: goTo("refuse")})
}

// direct are the terms of the exceptions.
func (b *builder) direct() (out [][]term) {
	for _, d := range b.c.Direct {
		proto, name := l4proto(unix.IPPROTO_TCP), "tcp"
		if d.Protocol == "udp" {
			proto, name = l4proto(unix.IPPROTO_UDP), "udp"
		}
		var when []term
		if d.To.IsValid() {
			when = append(when, daddr(d.To))
		}
		when = append(when, proto)
		if len(d.Ports) == 0 {
			out = append(out, when)
		}
		for _, p := range d.Ports {
			out = append(out, append(slices.Clone(when), dport(name, p)))
		}
	}
	return out
}

// guard looks at everything that leaves a process of this machine.
func (b *builder) guard() []rule {
	rs := append(b.stamps(), b.doors()...)
	if b.sidecar != nil {
		pass := accept
		if b.c.Everyone {
			pass = both(label(passed), accept)
		}
		rs = append(rs, rule{when: b.sidecar, then: pass})
	}
	rs = append(rs, b.thieves()...)
	if b.c.Everyone {
		return append(rs, rule{then: goTo("held")})
	}
	tcp := l4proto(unix.IPPROTO_TCP)
	// Of an answer to who connects the kernel knows no cgroup.
	ownApp := b.d.App != 0 && len(b.c.Cgroups) == 0
	for _, s := range b.held {
		if ownApp {
			rs = append(rs, rule{when: append(slices.Clone(s), tcp, sport(b.d.App)), then: label(answered)})
		}
		rs = append(rs, rule{when: s, then: goTo("held")})
	}
	if ownApp {
		rs = append(rs, onlyAnswered(b.d.App, toLoopback)...)
	}
	for _, q := range b.questions(b.d.Names) { // nobody else asks in the workload's name
		rs = append(rs, rule{when: append([]term{toLoopback}, append(q, asking)...), then: goTo("refuse")})
	}
	if b.d.Inbound != 0 && b.d.App != 0 {
		// Nobody else on the machine speaks to the application: it would be
		// judged by nobody.
		rs = append(rs, rule{when: []term{localDst, tcp, dport("tcp", b.d.App), asking}, then: goTo("refuse")})
	}
	if len(b.c.Users) > 0 {
		// A SYN cookie has no owner, and the connection that comes of it need not
		// send anything before its socket is closed: whose it is cannot be told.
		rs = append(rs, rule{when: []term{anyOwner}, then: accept}, rule{when: []term{tcp, synAck, free}, then: goTo("refuse")})
	}
	return rs
}

// stamps have the first packet to a door say from which port it was sent. The
// kernel may give the connection another one yet, where it would be the same as
// another that was brought there; then this alone tells whose it is.
func (b *builder) stamps() (rs []rule) {
	for _, p := range []uint16{b.d.Outbound, b.d.Names} {
		for _, here := range loopbacks {
			if p != 0 {
				rs = append(rs, rule{when: []term{daddr(here), l4proto(unix.IPPROTO_TCP), dport("tcp", p), opening}, then: stamp})
			}
		}
	}
	return rs
}

// doors labels the connections that the sidecar has answered. Of the first
// answer the kernel knows no cgroup: its user counts.
func (b *builder) doors() (rs []rule) {
	if b.c.SidecarUser == "" {
		return nil
	}
	for _, p := range []uint16{b.d.Outbound, b.d.Inbound, b.d.Names} {
		if p != 0 {
			rs = append(rs, rule{when: []term{b.sidecar[0], l4proto(unix.IPPROTO_TCP), sport(p)}, then: label(answered)})
		}
	}
	return rs
}

// thieves are those who listen at a door while the sidecar is gone: nothing of
// theirs arrives, so that nobody can tell them anything.
func (b *builder) thieves() []rule {
	if b.c.SidecarUser == "" {
		return nil
	}
	rs := onlyAnswered(b.d.Outbound, toLoopback)
	if b.d.Inbound != 0 {
		rs = append(rs, onlyAnswered(b.d.Inbound)...)
	}
	if b.d.Names != 0 { // what the sidecar answers from there was let through before
		rs = append(rs, onlyAnswered(b.d.Names, toLoopback)...)
		rs = append(rs, rule{when: []term{toLoopback, l4proto(unix.IPPROTO_UDP), udpSport(b.d.Names)}, then: goTo("refuse")})
	}
	return rs
}

// questions are the terms of what is asked at a port for names.
func (b *builder) questions(port uint16) [][]term {
	if b.d.Names == 0 {
		return nil
	}
	return [][]term{{l4proto(unix.IPPROTO_UDP), dport("udp", port)}, {l4proto(unix.IPPROTO_TCP), dport("tcp", port)}}
}

// namesPort is where DNS servers are asked.
const namesPort = 53

// askingNames brings what a workload asks any DNS server to the sidecar, also one
// on loopback, which would ask others for it.
func (b *builder) askingNames() (rs []rule) {
	for _, q := range b.questions(namesPort) {
		if b.c.Everyone {
			rs = append(rs, rule{when: q, then: redirectTo(b.d.Names)})
			continue
		}
		for _, s := range b.held {
			rs = append(rs, rule{when: append(slices.Clone(s), q...), then: redirectTo(b.d.Names)})
		}
	}
	return rs
}

// onlyAnswered refuses what is sent from a port, but in connections that its
// owner has answered. That nobody listens the kernel may say.
func onlyAnswered(port uint16, where ...term) []rule {
	from := append(slices.Clone(where), l4proto(unix.IPPROTO_TCP), sport(port))
	return []rule{
		{when: append(slices.Clone(from), labelled(answered)), then: accept},
		{when: append(slices.Clone(from), resets), then: accept},
		{when: from, then: goTo("refuse")},
	}
}

// arriving refuses what others send to the workload past the sidecar, whoever
// has changed its destination before.
func (b *builder) arriving() []rule {
	tcp, udp := l4proto(unix.IPPROTO_TCP), l4proto(unix.IPPROTO_UDP)
	rs := []rule{{when: []term{fromLoopback}, then: accept}, {when: []term{known}, then: accept}}
	if b.d.Inbound != 0 {
		rs = append(rs, rule{when: []term{tcp, dport("tcp", b.d.Inbound)}, then: accept})
	}
	for _, p := range b.c.InboundDirect {
		rs = append(rs, rule{when: []term{tcp, dport("tcp", p)}, then: accept})
	}
	if b.c.Everyone {
		return append(rs, rule{when: []term{tcp}, then: goTo("refuse")}, rule{when: []term{udp}, then: goTo("refuse")})
	}
	if b.d.Inbound != 0 && b.d.App != 0 {
		rs = append(rs, rule{when: []term{tcp, dport("tcp", b.d.App)}, then: goTo("refuse")}, rule{when: []term{udp, dport("udp", b.d.App)}, then: goTo("refuse")})
	}
	for _, s := range b.held {
		if strings.HasPrefix(s[0].text, "socket cgroupv2") { // of a user's socket the kernel does not know here
			rs = append(rs, rule{when: append([]term{tcp}, s...), then: goTo("refuse")}, rule{when: append([]term{udp}, s...), then: goTo("refuse")})
		}
	}
	return rs
}

// outbound brings what a workload opens to the sidecar.
func (b *builder) outbound() []rule {
	tcp := l4proto(unix.IPPROTO_TCP)
	var rs []rule
	if b.sidecar != nil {
		if b.d.Names != 0 { // before all else, so that the sidecar sees that the rules are in force
			udp, probe := l4proto(unix.IPPROTO_UDP), b.c.Probe()
			rs = append(rs, rule{when: []term{daddr(netip.PrefixFrom(probe, probe.BitLen())), udp, dport("udp", namesPort)}, then: redirectTo(b.d.Names)})
		}
		rs = append(rs, rule{when: b.sidecar, then: leave})
	}
	var direct []rule
	for _, when := range b.direct() {
		direct = append(direct, rule{when: when, then: leave})
	}
	if b.d.Names != 0 { // of questions the exceptions come first, loopback is none
		rs, direct = append(append(rs, direct...), b.askingNames()...), nil
	}
	for _, here := range loopbacks {
		rs = append(rs, rule{when: []term{daddr(here)}, then: leave})
	}
	rs = append(rs, direct...)
	if b.c.Everyone {
		return append(rs, rule{when: []term{tcp}, then: redirectTo(b.d.Outbound)})
	}
	for _, m := range b.maps {
		rs = append(rs, rule{when: []term{tcp}, then: redirectBy(m)})
	}
	return rs
}

// inbound brings what others open to the workload to the sidecar, which wants
// a proof of who they are.
func (b *builder) inbound() []rule {
	tcp := l4proto(unix.IPPROTO_TCP)
	rs := []rule{
		{when: []term{fromLoopback}, then: leave},
		{when: []term{tcp, dport("tcp", b.d.Inbound)}, then: leave},
	}
	for _, p := range b.c.InboundDirect {
		rs = append(rs, rule{when: []term{tcp, dport("tcp", p)}, then: leave})
	}
	when := []term{localDst, tcp}
	if !b.c.Everyone {
		if b.d.App == 0 {
			return rs
		}
		when = append(when, dport("tcp", b.d.App))
	}
	return append(rs, rule{when: when, then: redirectTo(b.d.Inbound)})
}

// String prints the rules for packets as a file for nft -f.
func (r *Rules) String() string { return tableText("inet", r.table, r.maps, r.chains) }

func tableText(family, name string, maps []portMap, chains []chain) string {
	var s strings.Builder
	fmt.Fprintf(&s, "table %s %s {\n", family, name)
	for _, m := range maps {
		fmt.Fprintf(&s, "\tmap %s {\n\t\ttype %s : inet_service\n\t\telements = { ", m.name, m.kind)
		for i, e := range m.elements {
			if i > 0 {
				s.WriteString(", ")
			}
			fmt.Fprintf(&s, "%s : %d", e.text, e.port)
		}
		s.WriteString(" }\n\t}\n\n")
	}
	for i, c := range chains {
		if i > 0 {
			s.WriteString("\n")
		}
		fmt.Fprintf(&s, "\tchain %s {\n", c.name)
		if h := c.hook; h != nil {
			at := h.at
			if h.device != "" {
				at += fmt.Sprintf(" device %q", h.device)
			}
			fmt.Fprintf(&s, "\t\ttype %s hook %s priority %d; policy accept;\n", h.kind, at, h.priority)
		}
		for _, ru := range c.rules {
			s.WriteString("\t\t" + ru.text() + "\n")
		}
		s.WriteString("\t}\n")
	}
	s.WriteString("}\n")
	return s.String()
}

// RoutesText prints the routes as commands.
func (r *Rules) RoutesText() string {
	var s strings.Builder
	for _, v := range r.routes() {
		fmt.Fprintf(&s, "ip route replace local %s dev lo src %s proto %d\n", v, sourceFor(v), routeProtocol)
	}
	return s.String()
}

func (ru rule) text() string {
	var words []string
	for _, t := range ru.when {
		words = append(words, t.text)
	}
	if ru.counted {
		words = append(words, "counter")
	}
	words = append(words, ru.then.text)
	if ru.comment != "" {
		words = append(words, `comment "`+ru.comment+`"`)
	}
	return strings.Join(words, " ")
}

// digest names the rules, so that others are told from them. It stands in a
// comment of the first rule and is made before that is there.
func (r *Rules) digest() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s%s%d", r, r.RoutesText(), r.cgroups))
	return hex.EncodeToString(sum[:8])
}

// A cgroup is one of the unified hierarchy.
type cgroup struct {
	path  string
	id    uint64
	level int
}

// unified are the places where the hierarchy is mounted.
var unified = []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}

// findCgroup looks a cgroup up. Its number is that of its folder.
func findCgroup(path string) (cgroup, error) {
	g := cgroup{path: path, level: strings.Count(path, "/")}
	for _, root := range unified {
		var fs unix.Statfs_t
		if err := unix.Statfs(root, &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(root, path), &st); err != nil {
			return g, fmt.Errorf("no cgroup %s below %s: start the unit first, or name a slice that stays", path, root)
		}
		g.id = st.Ino
		return g, nil
	}
	return g, errors.New("no unified cgroup hierarchy is mounted here: name users instead")
}
