-- The values that drivers read, and write to driver_ledger: a label with a space, nulls, text that has to be quoted.
insert into public.driver_sample values (
    1, 'so so', '{sad,NULL,"so so"}', row(1, 'a, "b"'), array[row(2, 'c'), row(null, '')]::public.driver_place[],
    'k=>"v w", n=>NULL'
);
