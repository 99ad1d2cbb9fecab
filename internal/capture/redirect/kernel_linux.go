package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The flags of a table (linux/netfilter/nf_tables.h).
const (
	tableDormant = 1
	tableOwner   = 2 // only the socket that made it may change it
	tablePersist = 4 // it stays when that socket is closed, and may be adopted
)

// nftaTableOwner is NFTA_TABLE_OWNER, the number of the owner's socket.
const nftaTableOwner = 7

var (
	// ErrHeld says that a living process owns the table.
	ErrHeld = errors.New("the rules are held by a running sidecar")
	// ErrDenied says that this process may not change the rules of the kernel.
	ErrDenied = errors.New("this needs CAP_NET_ADMIN in the network namespace")
)

// A Hold is rules in force. While it is open, and the kernel knows owners of
// tables, nobody else changes them; closed, they stay.
type Hold struct {
	conn  *nftables.Conn
	nl    *netlink.Conn
	table *nftables.Table
	// frames is the table for frames, nil where the kernel has no hook for them.
	frames *nftables.Table
	// Owned says whether the kernel keeps others off the rules.
	Owned bool
	rules *Rules
}

// Frames says whether frames are held that the workload puts together itself:
// Linux 5.16 is the first to, and it cannot by cgroup. Without an interface there
// are none.
func (h *Hold) Frames() bool { return h.frames != nil && len(h.rules.frames) > 0 }

// Install puts rules into force in place of those that the table has, all in
// one transaction. Routes come first: alone they change nothing for anybody.
func (r *Rules) Install() (*Hold, error) {
	routed, err := addRoutes(r.routes())
	if err != nil {
		return nil, err
	}
	h, err := open(r.table)
	if err == nil {
		if err = h.adoptAll(); err == nil {
			err = h.replace(r)
		}
		if err != nil {
			h.Close()
		}
	}
	if err != nil {
		return nil, errors.Join(err, delRoutes(routed)) // what was there before stays
	}
	return h, nil
}

// Replace puts other rules into the table that is held.
func (h *Hold) Replace(r *Rules) error {
	if r.table != h.table.Name {
		return fmt.Errorf("rules of table %s do not go into %s", r.table, h.table.Name)
	}
	if _, err := addRoutes(r.routes()); err != nil {
		return err
	}
	return h.replace(r)
}

// Digest names the rules that are to be in force, as the comments of their first
// rules do.
func (h *Hold) Digest() string { return h.rules.Digest() }

// Digest names the rules.
func (r *Rules) Digest() (digest string) {
	for _, c := range slices.Concat(r.chains, r.frames) {
		for _, ru := range c.rules {
			digest = joined(digest, ru.comment)
		}
	}
	return digest
}

// joined is what names two tables, of which one may have no name.
func joined(a, b string) string { return strings.TrimPrefix(strings.TrimSuffix(a+" "+b, " "), " ") }

// Close lets go of the rules, which stay in force.
func (h *Hold) Close() error { return h.conn.CloseLasting() }

// open connects to the kernel. Only the one connection may change a table that
// it owns.
func open(table string) (*Hold, error) {
	h := &Hold{table: &nftables.Table{Family: nftables.TableFamilyINet, Name: table}}
	var err error
	h.conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		h.nl = c
		return nil
	}))
	if err != nil {
		return nil, fmt.Errorf("capture: ask the kernel for its rules: %w", denied(err))
	}
	return h, nil
}

// adoptAll takes hold of both tables. Where the kernel has none for frames, that
// for packets stands alone.
func (h *Hold) adoptAll() (err error) {
	if h.Owned, err = h.adopt(h.table); err != nil {
		return err
	}
	frames := framesTable(h.table.Name)
	switch owned, err := h.adopt(frames); {
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
	case err != nil:
		return err
	default:
		h.frames, h.Owned = frames, h.Owned && owned
	}
	return nil
}

func framesTable(name string) *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyNetdev, Name: name}
}

// adopt makes a table, or takes hold of one that a process before left. The
// library can send no flags, so the message is ours. An empty table changes
// nothing for anybody.
func (h *Hold) adopt(t *nftables.Table) (owned bool, err error) {
	was, err := h.state(t)
	if err != nil {
		return false, err
	}
	if was.Installed && was.flags&(tableOwner|tablePersist) == 0 {
		return false, nil // by a kernel that knows no owners, or by hand; such a table cannot get one
	}
	if was.Owner != 0 {
		return false, fmt.Errorf("capture: table %s: %w (netlink port %d)", t.Name, ErrHeld, was.Owner)
	}
	err = h.newTable(t, tableOwner|tablePersist)
	if err == nil {
		return true, nil
	}
	if !was.Installed && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)) {
		err = h.newTable(t, 0)
	}
	if err != nil {
		return false, fmt.Errorf("capture: make table %s: %w", t.Name, denied(err))
	}
	return false, nil
}

func nfgen(family byte, res uint16) []byte {
	return append([]byte{family, 0}, network16(res)...)
}

func (h *Hold) newTable(t *nftables.Table, flags uint32) error {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: []byte(t.Name + "\x00")},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, flags)},
	})
	if err != nil {
		return err
	}
	message := func(typ int, flags netlink.HeaderFlags, data []byte) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | flags}, Data: data}
	}
	batch := nfgen(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	if _, err := h.nl.SendMessages([]netlink.Message{
		message(unix.NFNL_MSG_BATCH_BEGIN, 0, batch),
		message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWTABLE, netlink.Acknowledge|netlink.Create, append(nfgen(byte(t.Family), 0), attrs...)),
		message(unix.NFNL_MSG_BATCH_END, 0, batch),
	}); err != nil {
		return err
	}
	_, err = h.nl.Receive()
	return err
}

// replace swaps the content of the tables. A kernel that cannot hold frames holds
// packets.
func (h *Hold) replace(r *Rules) error {
	err := h.put(r)
	if h.frames != nil && len(r.frames) > 0 && errors.Is(err, unix.EOPNOTSUPP) {
		h.frames = nil
		err = h.put(r)
	}
	if err != nil {
		return err
	}
	h.rules = r
	return nil
}

// put does so in one transaction.
func (h *Hold) put(r *Rules) error {
	if err := h.clear(h.table); err != nil {
		return err
	}
	if h.frames != nil {
		if err := h.clear(h.frames); err != nil {
			return err
		}
		for _, c := range r.frames {
			h.chain(h.frames, c, nil)
		}
	}
	sets := map[string]*nftables.Set{}
	for _, m := range r.maps {
		kind := nftables.TypeUID
		if m.kind == "cgroupsv2" {
			kind = nftables.TypeCGroupV2
		}
		s := &nftables.Set{Table: h.table, Name: m.name, IsMap: true, KeyType: kind, DataType: nftables.TypeInetService, KeyByteOrder: binaryutil.NativeEndian}
		var es []nftables.SetElement
		for _, e := range m.elements {
			es = append(es, nftables.SetElement{Key: e.key, Val: network16(e.port)})
		}
		if err := h.conn.AddSet(s, es); err != nil {
			return fmt.Errorf("capture: map %s: %w", m.name, err)
		}
		sets[m.name] = s
	}
	for _, c := range r.chains {
		h.chain(h.table, c, sets)
	}
	if err := h.conn.Flush(); err != nil {
		return fmt.Errorf("capture: the kernel refused the rules, and keeps those it had: %w", denied(err))
	}
	return nil
}

// chain queues a chain and its rules.
func (h *Hold) chain(t *nftables.Table, c chain, sets map[string]*nftables.Set) {
	k := &nftables.Chain{Table: t, Name: c.name}
	if c.hook != nil {
		policy := nftables.ChainPolicyAccept
		k.Type, k.Hooknum, k.Policy, k.Device = nftables.ChainType(c.hook.kind), hooks[c.hook.at], &policy, c.hook.device
		k.Priority = nftables.ChainPriorityRef(nftables.ChainPriority(c.hook.priority))
	}
	h.conn.AddChain(k)
	for _, ru := range c.rules {
		h.conn.AddRule(ru.of(t, k, sets))
	}
}

var hooks = map[string]*nftables.ChainHook{
	"input": nftables.ChainHookInput, "output": nftables.ChainHookOutput, "prerouting": nftables.ChainHookPrerouting, "egress": nftables.ChainHookEgress,
}

func (ru rule) of(t *nftables.Table, c *nftables.Chain, sets map[string]*nftables.Set) *nftables.Rule {
	var es []expr.Any
	for _, w := range ru.when {
		es = append(es, w.exprs(sets)...)
	}
	if ru.counted {
		es = append(es, &expr.Counter{})
	}
	out := &nftables.Rule{Table: t, Chain: c, Exprs: append(es, ru.then.exprs(sets)...)}
	if ru.comment != "" {
		out.UserData = userdata.AppendString(nil, userdata.TypeComment, ru.comment)
	}
	return out
}

// clear queues the removal of what is in a table, for the same transaction as
// what comes instead.
func (h *Hold) clear(t *nftables.Table) error {
	chains, err := h.chains(t)
	if err != nil {
		return err
	}
	sets, err := h.conn.GetSets(t)
	if err != nil {
		return fmt.Errorf("capture: list the maps of table %s: %w", t.Name, denied(err))
	}
	if len(chains) > 0 {
		h.conn.FlushTable(t)
	}
	for _, c := range chains {
		h.conn.DelChain(c)
	}
	for _, s := range sets {
		h.conn.DelSet(s)
	}
	return nil
}

func (h *Hold) chains(t *nftables.Table) (out []*nftables.Chain, err error) {
	all, err := h.conn.ListChainsOfTableFamily(t.Family)
	if err != nil {
		return nil, fmt.Errorf("capture: list the chains of table %s: %w", t.Name, denied(err))
	}
	for _, c := range all {
		if c.Table.Name == t.Name {
			out = append(out, c)
		}
	}
	return out, nil
}

// Remove takes the rules away, then the routes. What is not there is no error;
// removed says whether there were any.
func Remove(c Config) (removed bool, err error) {
	h, err := open(c.Table)
	if err != nil {
		return false, err
	}
	defer h.Close()
	for _, t := range []*nftables.Table{h.table, framesTable(c.Table)} {
		was, err := h.state(t)
		if err != nil {
			return false, err
		}
		if was.Owner != 0 {
			return false, fmt.Errorf("capture: table %s: %w (netlink port %d)", c.Table, ErrHeld, was.Owner)
		}
		if was.Installed {
			removed = true
			h.conn.DelTable(t)
		}
	}
	if removed {
		if err := h.conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
			return false, fmt.Errorf("capture: remove table %s: %w", c.Table, denied(err))
		}
	}
	r := &Rules{virtual: virtualOf(c)}
	return removed, delRoutes(r.routes())
}

// A State is what the kernel has of a table.
type State struct {
	Installed bool
	// Owner is the netlink port of the process that holds the rules, 0 for none.
	Owner uint32
	// Owned says that nobody but their owner may change them; Stays that they
	// outlive it. Rules without an owner stay as well.
	Owned, Stays bool
	// Digest names the rules, as Rules.Digest does.
	Digest string
	// RefusedTCP and RefusedOther count packets that the workload sent, or was
	// sent past the sidecar.
	RefusedTCP, RefusedOther uint64
	// Frames is how many interfaces hold the frames that a workload puts together
	// itself, RefusedFrames counts these.
	Frames        int
	RefusedFrames uint64
	// Routes are the ranges of virtual addresses that lead to loopback.
	Routes []string

	flags uint32
}

// Look asks the kernel for the state of a table.
func Look(c Config) (State, error) {
	h, err := open(c.Table)
	if err != nil {
		return State{}, err
	}
	defer h.Close()
	s, err := h.state(h.table)
	if err != nil || !s.Installed {
		return s, err
	}
	if err := h.read(h.table, &s); err != nil {
		return s, err
	}
	frames := framesTable(c.Table)
	if f, err := h.state(frames); err == nil && f.Installed { // a kernel without such tables has none
		if err := h.read(frames, &s); err != nil {
			return s, err
		}
	}
	s.Routes, err = routesThere(virtualOf(c))
	return s, err
}

// read adds what the rules of a table say.
func (h *Hold) read(t *nftables.Table, s *State) error {
	chains, err := h.chains(t)
	if err != nil {
		return err
	}
	for _, k := range chains {
		rules, err := h.conn.GetRules(t, k)
		if err != nil {
			return fmt.Errorf("capture: list the rules of chain %s: %w", k.Name, denied(err))
		}
		if strings.HasPrefix(k.Name, framesOf) {
			s.Frames++
		}
		for i, ru := range rules {
			if text, ok := userdata.GetString(ru.UserData, userdata.TypeComment); ok && (strings.HasPrefix(text, "sha256:") || strings.HasPrefix(text, framesOf)) {
				s.Digest = joined(s.Digest, text)
			}
			s.count(k.Name, i, ru.Exprs)
		}
	}
	return nil
}

// count reads the counter of the i-th rule of a chain. Of those that refuse
// packets TCP is first.
func (s *State) count(chain string, i int, es []expr.Any) {
	for _, e := range es {
		n, ok := e.(*expr.Counter)
		switch {
		case !ok:
		case strings.HasPrefix(chain, framesOf):
			s.RefusedFrames += n.Packets
		case chain == "refuse" && i == 0:
			s.RefusedTCP = n.Packets
		case chain == "refuse":
			s.RefusedOther = n.Packets
		}
	}
}

// state asks for the table itself. The library reads its flags in the wrong
// order of bytes and its owner not at all.
func (h *Hold) state(t *nftables.Table) (State, error) {
	name, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_TABLE_NAME, Data: []byte(t.Name + "\x00")}})
	if err != nil {
		return State{}, err
	}
	got, err := h.nl.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETTABLE, Flags: netlink.Request},
		Data:   append(nfgen(byte(t.Family), 0), name...),
	})
	if errors.Is(err, unix.ENOENT) {
		return State{}, nil
	}
	if err != nil || len(got) == 0 || len(got[0].Data) < 4 {
		return State{}, fmt.Errorf("capture: look at table %s: %w", t.Name, errors.Join(denied(err), emptyAnswer(err)))
	}
	ad, err := netlink.NewAttributeDecoder(got[0].Data[4:])
	if err != nil {
		return State{}, fmt.Errorf("capture: look at table %s: %w", t.Name, err)
	}
	ad.ByteOrder = binary.BigEndian
	s := State{Installed: true}
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_TABLE_FLAGS:
			s.flags = ad.Uint32()
		case nftaTableOwner:
			s.Owner = ad.Uint32()
		}
	}
	s.Owned, s.Stays = s.Owner != 0, s.flags&tableOwner == 0 || s.flags&tablePersist != 0
	if s.flags&tableDormant != 0 {
		s.Installed = false // its rules do nothing
	}
	return s, ad.Err()
}

func emptyAnswer(err error) error {
	if err == nil {
		return errors.New("the kernel gave no answer")
	}
	return nil
}

// denied says what a lack of rights means here.
func denied(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w (%w)", ErrDenied, err)
	}
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return fmt.Errorf("this kernel has no nftables (%w)", err)
	}
	return err
}
