package http2

// decode takes a whole field section in (RFC 7541). An error ends the connection:
// the table of HPACK is not what the peer believes any more.
func (s *section) decode(block []byte) error {
	s.begin()
	for b, first := block, true; len(b) > 0; {
		var ok bool
		switch c := b[0]; {
		case c&0x80 != 0:
			var i int
			var f field
			if i, b, ok = readInt(b, 7); ok {
				f, ok = s.table.at(i)
			}
			if ok {
				s.add(f)
			}
		case c&0x40 != 0:
			b, ok = s.literal(b, 6, true)
		case c&0x20 != 0:
			var n int
			n, b, ok = readInt(b, 5)
			if ok = ok && first && n <= tableSize; ok {
				s.table.most = n
				s.table.evict(n)
			}
			if !ok {
				return violated(Compression, BadBlock)
			}
			continue
		default:
			b, ok = s.literal(b, 4, false)
		}
		if !ok {
			return violated(Compression, BadBlock)
		}
		first = false
	}
	return nil
}

// literal takes in a field that is not of a table, or only its name is.
func (s *section) literal(b []byte, bits uint, insert bool) (rest []byte, ok bool) {
	i, b, ok := readInt(b, bits)
	if !ok {
		return nil, false
	}
	var f field
	line := s.line[:0]
	if i > 0 {
		if f, ok = s.table.at(i); !ok {
			return nil, false
		}
		line = append(line, f.line[:f.name]...)
	} else {
		if line, b, ok = readString(line, b); !ok {
			return nil, false
		}
		f.name, f.class = len(line), classOf(line)
	}
	line = append(line, ": "...)
	if line, b, ok = readString(line, b); !ok {
		return nil, false
	}
	f.bad = !validValue(line[f.name+2:])
	f.line = append(line, "\r\n"...)
	s.line = f.line[:0]
	s.add(f)
	if insert {
		s.table.insert(f)
	}
	return b, true
}

// readInt reads an integer behind the high bits of its first byte (RFC 7541
// section 5.1). None that is in order takes more than four bytes more.
func readInt(b []byte, bits uint) (n int, rest []byte, ok bool) {
	most := 1<<bits - 1
	n, b = int(b[0])&most, b[1:]
	if n < most {
		return n, b, true
	}
	for i, c := range b[:min(len(b), 4)] {
		n += int(c&0x7f) << (7 * i)
		if c&0x80 == 0 {
			return n, b[i+1:], true
		}
	}
	return 0, nil, false
}

// readString appends a string to dst.
func readString(dst, b []byte) (out, rest []byte, ok bool) {
	if len(b) == 0 {
		return nil, nil, false
	}
	coded := b[0]&0x80 != 0
	n, b, ok := readInt(b, 7)
	if !ok || n > len(b) {
		return nil, nil, false
	}
	if !coded {
		return append(dst, b[:n]...), b[n:], true
	}
	dst, ok = appendHuffman(dst, b[:n])
	return dst, b[n:], ok
}
