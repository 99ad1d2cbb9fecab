package nameserver

import "encoding/binary"

// Numbers of RFC 1035 and its successors, as far as the common question needs
// them.
const (
	headSize = 12
	maxName  = 255
	minSize  = 512 // what everybody takes

	typeA, typeOPT, typeAAAA = 1, 41, 28
	classIN                  = 1
)

// A question is what is asked in the common form: one question of class IN in a
// message that has nothing else but an OPT record without options.
type question struct {
	name [maxName]byte // in lower case, as on the wire, with the root at its end
	n    int           // how much of name is used
	end  int           // where the question ends in the message
	typ  uint16
	size int // what the asker takes in one piece
	edns bool
	do   bool
}

// parse reads a message. What is not in the common form is not read: it may be
// right or wrong.
func (q *question) parse(b []byte) bool {
	// A standard query, not truncated, that asks for recursion or not; of the rest
	// only AD and CD may be set.
	if len(b) < headSize+5 || b[2]&^1 != 0 || b[3]&^0x30 != 0 {
		return false
	}
	more := binary.BigEndian.Uint16(b[10:])
	if binary.BigEndian.Uint32(b[4:]) != 1<<16 || b[8] != 0 || b[9] != 0 || more > 1 {
		return false
	}
	i := headSize
	q.n = 0
	for {
		if i >= len(b) {
			return false
		}
		l := int(b[i])
		if l > 63 || i+1+l >= len(b) || q.n+1+l >= maxName {
			return false
		}
		q.name[q.n] = b[i]
		for j, c := range b[i+1 : i+1+l] {
			if c-'A' < 26 {
				c |= 0x20
			}
			q.name[q.n+1+j] = c
		}
		q.n += 1 + l
		i += 1 + l
		if l == 0 {
			break
		}
	}
	if i+4 > len(b) || binary.BigEndian.Uint16(b[i+2:]) != classIN {
		return false
	}
	q.typ = binary.BigEndian.Uint16(b[i:])
	q.end = i + 4
	q.size, q.edns, q.do = minSize, false, false
	if more == 0 {
		return q.end == len(b)
	}
	return q.option(b[q.end:])
}

// option reads an OPT record of version 0 without options (RFC 6891).
func (q *question) option(b []byte) bool {
	if len(b) != 11 || b[0] != 0 || binary.BigEndian.Uint16(b[1:]) != typeOPT || b[5] != 0 || b[6] != 0 || b[7]&^0x80 != 0 || b[8] != 0 || b[9] != 0 || b[10] != 0 {
		return false
	}
	q.edns, q.do = true, b[7] != 0
	q.size = min(max(int(binary.BigEndian.Uint16(b[3:])), minSize), maxSize)
	return true
}

// key is the name by which what it means is found.
func (q *question) key() []byte { return q.name[:q.n] }

// host turns a name on the wire into text without the last dot. Labels that no
// host has, with dots or bytes beyond letters, digits, "-" and "_", have none.
func host(wire []byte) (string, bool) {
	out := make([]byte, 0, len(wire))
	for i := 0; i < len(wire) && wire[i] != 0; {
		l := int(wire[i])
		if len(out) > 0 {
			out = append(out, '.')
		}
		for _, c := range wire[i+1 : i+1+l] {
			if c-'a' >= 26 && c-'0' >= 10 && c != '-' && c != '_' {
				return "", false
			}
			out = append(out, c)
		}
		i += 1 + l
	}
	return string(out), true
}
