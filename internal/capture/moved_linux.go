package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	// maxMoved is how many connections may be looked at for one.
	maxMoved = 1 << 10
	// movedTries is how often they are looked at while they come and go.
	movedTries = 3
	// halfOpen are the states, as bits, of a connection whose other end has just
	// accepted it: ESTABLISHED, FIN_WAIT1 and FIN_WAIT2.
	halfOpen = 1<<1 | 1<<4 | 1<<5
)

// Moved names the processes that may be at the other end of a connection which was
// brought here on its way from an address to another place, and of which nobody is
// the owner by its port. A program may have two connections from one port to two
// places. Brought to the same one they would be the same, so the kernel gives one
// of them another port, and tells nobody here of which. It is one of those from
// that address to that place: who lets it in must let in all that are returned.
func (o *Owners) Moved(to netip.AddrPort, from netip.Addr, candidates ...int) (out []Process, err error) {
	to, from = unmap(to), from.Unmap().WithZone("")
	for range movedTries {
		if out, err = o.moved(to, from, candidates); !errors.Is(err, ErrNoOwner) {
			return out, err
		}
	}
	return nil, err
}

func (o *Owners) moved(to netip.AddrPort, from netip.Addr, candidates []int) (out []Process, err error) {
	ends, err := o.between(from, to)
	if err != nil {
		return nil, err
	}
	if len(ends) == 0 {
		return nil, ErrNoOwner
	}
	for _, src := range ends {
		p, err := o.Of(to, src, candidates...)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(out, func(q Process) bool { return q.Same(p) }) {
			out = append(out, p)
		}
	}
	return out, nil
}

// between asks for the ends of all connections from an address to a place.
func (o *Owners) between(from netip.Addr, to netip.AddrPort) (ends []netip.AddrPort, err error) {
	o.asking.Lock()
	defer o.asking.Unlock()
	families := []byte{unix.AF_INET, unix.AF_INET6} // one of IPv6 may speak to a mapped address
	if from.Is6() {
		families = families[1:]
	}
	for _, family := range families {
		req := diagRequest(netip.AddrPortFrom(from, 0), to)
		req[nlHeaderLen] = family
		binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
		binary.NativeEndian.PutUint32(req[nlHeaderLen+4:], halfOpen)
		err := o.asked(func(fd int) error {
			if err := unix.Sendto(fd, req[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
				return fmt.Errorf("owner of connection: ask sock_diag: %w", err)
			}
			return dumped(fd, func(m []byte) {
				if _, _, src, dst := diagEnds(m); src.Addr() == from && dst == to {
					ends = append(ends, src)
				}
			})
		})
		if err != nil {
			return nil, err
		}
	}
	if len(ends) > maxMoved {
		return nil, fmt.Errorf("owner of connection: it may be one of %d, and %d are looked at: %w", len(ends), maxMoved, ErrNoOwner)
	}
	return ends, nil
}

// dumped reads all of an answer that has many parts, whatever is in them: what
// stayed would be taken for the answer to another question.
func dumped(fd int, each func(m []byte)) (err error) {
	buf := make([]byte, 64<<10)
	for {
		n, from, rerr := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT)
		if errors.Is(rerr, unix.EINTR) {
			continue
		}
		if rerr != nil {
			return fmt.Errorf("owner of connection: read sock_diag: %w", rerr)
		}
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
			continue // not from the kernel
		}
		over, perr := parseDump(buf[:n], each)
		if err == nil {
			err = perr
		}
		if over {
			return err
		}
	}
}

// parseDump reads one part of such an answer, and says whether it is the last one.
func parseDump(b []byte, each func(m []byte)) (over bool, err error) {
	ne := binary.NativeEndian
	for len(b) >= nlHeaderLen {
		size := int(ne.Uint32(b))
		if size < nlHeaderLen || size > len(b) {
			return false, fmt.Errorf("owner of connection: a message of %d bytes in %d", size, len(b))
		}
		m := b[nlHeaderLen:size]
		switch typ := ne.Uint16(b[4:]); {
		case typ == unix.NLMSG_DONE:
			return true, nil
		case typ == unix.NLMSG_ERROR && len(m) >= 4:
			return true, fmt.Errorf("owner of connection: sock_diag: %w", unix.Errno(-int32(ne.Uint32(m))))
		case typ != unix.SOCK_DIAG_BY_FAMILY || len(m) < diagMsgLen:
			err = fmt.Errorf("owner of connection: unexpected answer type %d of %d bytes", typ, len(m))
		default:
			each(m)
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return false, err
}
